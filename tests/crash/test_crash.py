"""kill -9: a node is killed at random moments, from its start-up to deep in its work, and started again on
the same directories. It must never refuse what the crash left, never give wrong bytes, and find again exactly
the blocks whose records reached the table. CRASH_ROUNDS (40) in all; CRASH_SEED repeats a run."""
import os
import random
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

import slot_table

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "40"))
SEED = int(os.environ.get("CRASH_SEED", str(int(time.time()))))
BUILD = Path(os.environ.get("FLEXKV_BUILD", Path(__file__).resolve().parents[2] / "build"))
PROGRAM = BUILD / "tests" / "crash" / "crash_node"
DEADLINE = 60


@pytest.fixture
def place():
    base = tempfile.mkdtemp(prefix="flexkv-crash-")
    yield Path(base)
    shutil.rmtree(base, ignore_errors=True)


class Running:
    """The program in the background; never outlives its block."""

    def __init__(self, *args):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([str(PROGRAM), *args], stdout=subprocess.PIPE,
                                        stderr=self.errors, bufsize=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.stdout.close()
        self.errors.close()

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return self.process.wait(DEADLINE)

    def said(self):
        self.errors.seek(0)
        return self.errors.read()

    def wait_open(self):
        """Number of blocks found again; a refusal is a failed test."""
        line, end = b"", time.monotonic() + DEADLINE
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            assert ready, f"not open after {DEADLINE} s: {self.said()}"
            got = os.read(self.process.stdout.fileno(), 1)
            assert got, f"start-up refused ({self.process.wait(DEADLINE)}): {self.said()}"
            line += got
        word, blocks = line.split()
        assert word == b"open"
        return int(blocks)


def settled_records(dirs):
    """What the tables hold once the kernel has finished what the dead process had begun."""
    before = slot_table.read_records(dirs)
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        time.sleep(0.02)
        now = slot_table.read_records(dirs)
        if now == before:
            return now
        before = now
    pytest.fail("the tables of a dead process keep changing")


def work_and_kill(dirs, rng, early):
    """Starts a node and kills it; the number of blocks it found, or None if it was not open yet."""
    with Running("run", ";".join(dirs), str(rng.randrange(1 << 30))) as node:
        found = None
        if early:
            time.sleep(rng.uniform(0, 0.04))
        else:
            found = node.wait_open()
            time.sleep(rng.uniform(0, 0.4))
        status = node.process.poll()
        assert status is None, f"the node ended by itself ({status}): {node.said()}"
        node.kill()
        return found


def check_restart(dirs):
    """(blocks found, those announced as KV events, those that could not be read) of a start on what the crash
    left."""
    expected = slot_table.expected_keys(settled_records(dirs))
    done = subprocess.run([str(PROGRAM), "list", ";".join(dirs)], capture_output=True, text=True,
                          timeout=DEADLINE)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    lines = done.stdout.splitlines()
    assert lines[0] == f"open {len(expected)}", f"{lines[0]}, but {len(expected)} are on the disk"
    word, named = lines[1].split()
    assert word == "named" and int(named) <= len(expected)
    for line in lines[2:-1]:
        _, known, *keys = line.split()
        keys = [bytes.fromhex(k) for k in keys]
        there = 0
        while there < len(keys) and keys[there] in expected:
            there += 1
        assert int(known) == there, f"{known} leading blocks matched, {there} are on the disk"
    word, got, failed = lines[-1].split()
    assert word == "checked"
    assert int(got) + int(failed) <= len(keys) * (len(lines) - 3)
    return len(expected), int(named), int(failed)


@pytest.mark.parametrize("n_dirs", [1, 2])
def test_kill_9(place, n_dirs, record_property):
    if not PROGRAM.exists():
        pytest.skip(f"{PROGRAM} is not built")
    rng = random.Random(SEED + n_dirs)
    print(f"CRASH_SEED={SEED}")
    dirs = []
    start, found_in_all, named_in_all, rounds = time.monotonic(), 0, 0, max(1, ROUNDS // 2)
    for number in range(rounds):
        if number % 10 == 0:                # a new store now and then: killed while it is made
            for d in dirs:
                shutil.rmtree(d)
            dirs = [str(place / f"{number}-{i}") for i in range(n_dirs)]
        work_and_kill(dirs, rng, early=number % 10 == 0 or rng.random() < 0.2)
        if rng.random() < 0.8:              # else the next run meets it as it is
            found, named, _ = check_restart(dirs)
            found_in_all += found
            named_in_all += named
    record_property("rounds_per_minute", round(rounds * 60 / (time.monotonic() - start)))
    print(f"{rounds} rounds, {rounds * 60 / (time.monotonic() - start):.0f} a minute, "
          f"{found_in_all} blocks found again, {named_in_all} with their names, seed {SEED}")
    assert rounds < 10 or found_in_all > 0
    # A slot that was being overwritten has the old record and the new name, or none: writes under way.
    assert rounds < 10 or named_in_all > found_in_all // 2


def test_the_oracle_itself():
    """Orphans, cycles and duplicates are told apart by the reader too."""
    a, b, c, d = (bytes([n]) * 16 for n in (1, 2, 3, 4))
    zero = slot_table.ZERO
    assert slot_table.expected_keys([(a, zero, 1, 0), (b, a, 2, 1), (c, d, 3, 2)]) == {a, b}
    assert slot_table.expected_keys([(a, b, 1, 0), (b, a, 2, 1)]) == set()
    assert slot_table.expected_keys([(a, zero, 1, 0), (a, d, 5, 3), (b, a, 2, 1)]) == set()
    assert slot_table.crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
