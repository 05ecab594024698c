"""What the tests of the Python package share: engine memory whose bytes follow from key, rank and region, so
that every byte that comes back can be checked."""
import contextlib
import ctypes
import faulthandler
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import flexkv

KEY_BYTES = 16


def run_python(code, timeout=60):
    """A script in a process of its own; what it printed. The process must end well and quietly."""
    path = os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def split_keys(keys):
    return [bytes(keys[i:i + KEY_BYTES]) for i in range(0, len(keys), KEY_BYTES)]


def block_bytes(key, rank, region, size):
    return hashlib.shake_128(key + bytes([rank, region])).digest(size)


class Memory:
    """Pages of the ranks from first on. Between the pages lie gaps that nobody may write to."""

    GAP = 24
    GAP_BYTE = 0xEE

    def __init__(self, pages=64, ranks=1, region_bytes=(3072, 1000), first=0):
        self.pages, self.ranks, self.region_bytes = pages, range(first, first + ranks), region_bytes
        self.buffers = {}
        for rank in self.ranks:
            for region, size in enumerate(region_bytes):
                stride = size + self.GAP
                self.buffers[rank, region] = ctypes.create_string_buffer(
                    bytes([self.GAP_BYTE]) * (stride * pages), stride * pages)

    @property
    def slice_bytes(self):
        return sum(self.region_bytes)

    def regions(self, rank):
        return [(ctypes.addressof(self.buffers[rank, region]), size + self.GAP, size, self.pages)
                for region, size in enumerate(self.region_bytes)]

    def _view(self, rank, region, page):
        stride = self.region_bytes[region] + self.GAP
        return memoryview(self.buffers[rank, region]).cast("B")[page * stride:(page + 1) * stride]

    def _all(self):
        return ((rank, region, size) for rank in self.ranks
                for region, size in enumerate(self.region_bytes))

    def fill(self, page, key):
        for rank, region, size in self._all():
            self._view(rank, region, page)[:size] = block_bytes(key, rank, region, size)

    def spoil(self, page):
        for rank, region, size in self._all():
            self._view(rank, region, page)[:size] = b"\x5a" * size

    def holds(self, page, key):
        return all(self._view(rank, region, page)[:size] == block_bytes(key, rank, region, size)
                   for rank, region, size in self._all())

    def is_spoiled(self, page):
        return all(self._view(rank, region, page)[:size] == b"\x5a" * size for rank, region, size in self._all())

    def gaps_are_whole(self):
        gap = bytes([self.GAP_BYTE]) * self.GAP
        return all(self._view(rank, region, page)[size:] == gap
                   for rank, region, size in self._all() for page in range(self.pages))


class Rig:
    """A node in this process with one space, whose memory is registered."""

    def __init__(self, ranks=1, tokens_per_block=4, pages=64, **options):
        self.node = open_node(**options)
        self.memory = Memory(pages, ranks)
        self.space = self.node.space(fingerprint=b"test-model", tokens_per_block=tokens_per_block, ranks=ranks,
                                     slice_bytes=self.memory.slice_bytes)
        for rank in range(ranks):
            self.space.register(rank, self.memory.regions(rank))
        self.namespace = self.space.namespace()

    def keys(self, chain, blocks, namespace=None):
        tokens = [chain * 1000003 + i for i in range(blocks * self.space.tokens_per_block)]
        return (namespace or self.namespace).keys_from_tokens(tokens)

    def finish(self, op):
        return finish(self.node, op)

    def put(self, keys, pages, first=0, namespace=None):
        for key, page in zip(split_keys(keys)[first:], pages):
            self.memory.fill(page, key)
        return self.finish((namespace or self.namespace).put(keys, first, pages))

    def get(self, keys, pages, namespace=None):
        """Gets what is known, checks every byte; the number of blocks."""
        found = (namespace or self.namespace).match(keys)
        pages = pages[:found.blocks]
        for page in pages:
            self.memory.spoil(page)
        done = self.finish(self.node.get(found.lease, 0, pages))
        assert (done.kind, done.status, done.blocks_ok) == (flexkv.OP_GET, 0, found.blocks)
        for key, page in zip(split_keys(keys), pages):
            assert self.memory.holds(page, key)
        return found.blocks


def open_node(**options):
    config = flexkv.Config()
    for key, value in {"cpu_cache_blocks": 64, "log_level": "CRITICAL", **options}.items():
        config.set(key, str(value))
    return flexkv.Node.open(config)


def finish(node, op, timeout_ms=20000):
    done = node.poll(max=1, timeout_ms=timeout_ms)
    assert [c.op for c in done] == [op], "one completion, of the operation under way"
    return done[0]


_addresses = itertools.count()


def new_address():
    """Where nobody has listened yet, of all tests of this process."""
    return f"ipc://@flexkv-test-{os.getpid()}-{next(_addresses)}"


def wait_until(condition, seconds=20, what="the condition"):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about in {seconds} s"
        time.sleep(0.002)


def states(pid):
    """Of the process's threads, as /proc has them; those that end meanwhile have none."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield stat.read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def stopped(pid):
    """Within it the process stands still, with all its threads: the signal alone does not wait for that."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: set(states(pid)) == {"T"}, what="the process's standstill")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(autouse=True)
def no_test_hangs():
    """Ends the run with all stacks, even if a thread never gives up the GIL."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def make_rig():
    rigs = []

    def make(**options):
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.node.close()


@pytest.fixture
def rig(make_rig):
    return make_rig()
