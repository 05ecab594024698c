"""A process of an engine that does nothing but move KV: a worker with its pages, or a scheduler. It reads one JSON
object per line from standard input and answers each with one line. Uses the shared library that LIBFLEXKV names.

    fake_engine.py worker    ADDRESS SPACE INSTANCE WORKER
    fake_engine.py scheduler ADDRESS SPACE INSTANCE WORKERS

worker     fill PAGES SEED: bytes that depend on worker, page's place in the list and seed; check: are they there?; state
scheduler  connect; open; match SEED BLOCKS; put SEED PAGES; get SEED PAGES. SEED names a prompt
"""
import ctypes as c
import json
import os
import random
import sys

PAGE = 8192
PAGES = 64
TOKENS = 16
WAIT_MS = 10000


class Key(c.Structure):
    _fields_ = [("lo", c.c_uint64), ("hi", c.c_uint64)]


class Region(c.Structure):
    _fields_ = [("base", c.c_void_p), ("stride", c.c_uint64), ("page_bytes", c.c_uint64), ("pages", c.c_uint64)]


class SpaceDesc(c.Structure):
    _fields_ = [("struct_bytes", c.c_size_t), ("name", c.c_char_p), ("fingerprint", c.c_char_p),
                ("fingerprint_bytes", c.c_size_t), ("tokens_per_block", c.c_uint32), ("ranks", c.c_uint32),
                ("slice_bytes", c.c_uint64), ("instance", c.c_char_p), ("workers", c.c_uint32), ("wait_ms", c.c_uint32)]


class AgentDesc(c.Structure):
    _fields_ = [("struct_bytes", c.c_size_t), ("address", c.c_char_p), ("space", c.c_char_p), ("instance", c.c_char_p),
                ("worker", c.c_uint32), ("slice", c.c_uint32), ("replica", c.c_uint32), ("replicas", c.c_uint32),
                ("timeout_ms", c.c_uint32)]


class MatchResult(c.Structure):
    _fields_ = [("lease", c.c_uint64), ("blocks", c.c_uint32), ("cpu_blocks", c.c_uint32), ("ssd_blocks", c.c_uint32)]


class OpArgs(c.Structure):
    _fields_ = [("struct_bytes", c.c_size_t), ("pages", c.c_void_p), ("timeout_ms", c.c_uint32),
                ("user_data", c.c_void_p), ("results", c.c_void_p)]


class Completion(c.Structure):
    _fields_ = [("op", c.c_uint64), ("user_data", c.c_void_p), ("kind", c.c_uint32), ("status", c.c_int32),
                ("blocks", c.c_uint32), ("blocks_ok", c.c_uint32), ("flags", c.c_uint32), ("reserved", c.c_uint32)]


def load():
    lib = c.CDLL(os.environ["LIBFLEXKV"])
    lib.flexkv_last_error.restype = c.c_char_p
    lib.flexkv_keys_from_tokens.restype = c.c_size_t
    return lib


def contents(worker, seed, at):
    return random.Random(f"{worker} {seed} {at}").randbytes(PAGE)


class Worker:
    def __init__(self, lib, address, space, instance, worker):
        self.lib, self.worker = lib, int(worker)
        self.memory = c.create_string_buffer(PAGE * PAGES)
        region = Region(c.addressof(self.memory), PAGE, PAGE, PAGES)
        desc = AgentDesc(c.sizeof(AgentDesc), address.encode(), space.encode(), instance.encode(), self.worker,
                         self.worker, 0, 1, 0)
        self.agent = c.c_void_p()
        rc = lib.flexkv_agent_create(c.byref(desc), c.byref(region), c.c_size_t(1), c.byref(self.agent))
        assert rc == 0, lib.flexkv_last_error()

    def state(self):
        return {"state": self.lib.flexkv_agent_state(self.agent)}

    def fill(self, pages, seed):
        for at, page in enumerate(pages):
            c.memmove(c.addressof(self.memory) + page * PAGE, contents(self.worker, seed, at), PAGE)
        return {}

    def check(self, pages, seed):
        raw = self.memory.raw
        return {"equal": [raw[page * PAGE:(page + 1) * PAGE] == contents(self.worker, seed, at)
                          for at, page in enumerate(pages)]}


class Scheduler:
    def __init__(self, lib, address, space, instance, workers):
        self.lib, self.address, self.name, self.instance = lib, address, space, instance
        self.workers = int(workers)
        self.node, self.space, self.ns = c.c_void_p(), c.c_void_p(), c.c_void_p()

    def _answer(self, rc, **more):
        return {"rc": rc, "error": self.lib.flexkv_last_error().decode() if rc < 0 else "", **more}

    def connect(self):
        return self._answer(self.lib.flexkv_node_connect(None, self.address.encode(), c.byref(self.node)))

    def open(self, wait_ms=WAIT_MS):
        desc = SpaceDesc(c.sizeof(SpaceDesc), self.name.encode(), b"model", 5, TOKENS, self.workers, 0,
                         self.instance.encode(), self.workers, wait_ms)
        rc = self.lib.flexkv_space_open(self.node, c.byref(desc), c.byref(self.space))
        if rc == 0:
            rc = self.lib.flexkv_namespace_open(self.space, None, c.c_size_t(0), c.byref(self.ns))
        return self._answer(rc)

    def _keys(self, seed, blocks):
        rng = random.Random(seed)
        n = blocks * TOKENS
        tokens = (c.c_uint32 * n)(*(rng.randrange(50000) for _ in range(n)))
        keys = (Key * blocks)()
        assert self.lib.flexkv_keys_from_tokens(self.ns, None, tokens, c.c_size_t(n), keys) == blocks
        return keys

    def _wait(self, rc):
        done = Completion()
        if rc:
            return self._answer(rc)
        n = self.lib.flexkv_poll(self.node, c.byref(done), 1, WAIT_MS)
        assert n == 1, "no completion"
        return self._answer(0, status=done.status, blocks_ok=done.blocks_ok, flags=done.flags)

    def _args(self, pages):
        return OpArgs(c.sizeof(OpArgs), c.cast((c.c_uint32 * len(pages))(*pages), c.c_void_p), 0, None, None)

    def match(self, seed, blocks):
        found = MatchResult()
        rc = self.lib.flexkv_match(self.ns, self._keys(seed, blocks), c.c_size_t(blocks), c.byref(found))
        return self._answer(rc, matched=found.blocks, ssd=found.ssd_blocks, lease=found.lease)

    def put(self, seed, pages):
        args, op = self._args(pages), c.c_uint64()
        return self._wait(self.lib.flexkv_put(self.ns, self._keys(seed, len(pages)), len(pages), 0, c.byref(args),
                                              c.byref(op)))

    def get(self, seed, pages):
        found = self.match(seed, len(pages))
        if not found["matched"]:
            return {**found, "status": 0, "blocks_ok": 0}
        args, op = self._args(pages), c.c_uint64()
        rc = self.lib.flexkv_get(self.node, c.c_uint64(found["lease"]), 0, found["matched"], c.byref(args), c.byref(op))
        return {**found, **self._wait(rc)}


def main():
    role = {"worker": Worker, "scheduler": Scheduler}[sys.argv[1]](load(), *sys.argv[2:])
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(role, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
