"""Workers and daemons in processes of their own, for test_processes.py. They are spawned, as engines do it, and
do what they are told through a pipe; they die with the test."""
import ctypes
import multiprocessing
import signal
import traceback

import flexkv
from conftest import Memory, open_node

DEADLINE_S = 30
PR_SET_PDEATHSIG = 1


class WorkerSide:
    """In the worker's process: its pages, and the agent that moves them."""

    def __init__(self, address, region_bytes=(3072, 1000), slice=0, **options):
        self.memory = Memory(region_bytes=region_bytes, first=slice)
        self.agent = flexkv.Agent(address, self.memory.regions(slice), slice=slice, **options)

    def state(self):
        return self.agent.state()

    def error(self):
        return self.agent.error

    def fill(self, pages, keys):
        for page, key in zip(pages, keys, strict=True):
            self.memory.fill(page, key)

    def spoil(self, pages=None):
        for page in range(self.memory.pages) if pages is None else pages:
            self.memory.spoil(page)

    def wrong(self, pages, keys):
        """The pages that do not hold the blocks of the keys; the others must be as spoil left them."""
        expected = dict(zip(pages, keys, strict=True))
        return [page for page in range(self.memory.pages)
                if not (self.memory.holds(page, expected[page]) if page in expected
                        else self.memory.is_spoiled(page))] + [-1] * (not self.memory.gaps_are_whole())

    def holds(self, pages, keys):
        return [self.memory.holds(page, key) for page, key in zip(pages, keys, strict=True)]

    def revoke(self, ops):
        return self.agent.revoke(ops)

    def close(self):
        self.agent.close()


class DaemonSide:
    def __init__(self, address, **options):
        self.node = open_node(**options)
        self.node.serve(address)

    def stats(self):
        return self.node.stats()

    def wait_idle(self, idle_ms, timeout_ms):
        return self.node.wait_idle(idle_ms, timeout_ms)

    def close(self):
        self.node.close()


def serve_orders(pipe, side, args, options):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    it = side(*args, **options)
    pipe.send((True, None))
    while True:
        name, args = pipe.recv()
        if name == "leave":
            return                      # and what is open stays open
        try:
            pipe.send((True, getattr(it, name)(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Remote:
    """The test's end of such a process."""

    def __init__(self, side, *args, **options):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_orders, args=(theirs, side, args, options), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def _answer(self):
        assert self.pipe.poll(DEADLINE_S), "the process does not answer"
        ok, value = self.pipe.recv()
        assert ok, value
        return value

    def ask(self, name, *args):
        self.pipe.send((name, args))
        return self._answer()

    def leave(self):
        """Lets the process end by itself; its exit status."""
        self.pipe.send(("leave", ()))
        self.process.join(DEADLINE_S)
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join(DEADLINE_S)
        self.pipe.close()
