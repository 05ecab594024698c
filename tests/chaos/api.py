"""FlexKV's C API for the processes of the chaos test, through the shared library (FLEXKV_LIB). A failed call raises
Failed, with errno and the library's words."""
import ctypes as c
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))
from fake_engine import AgentDesc, Completion, Key, MatchResult, OpArgs, Region, SpaceDesc  # noqa: E402

PAGES_BUSY = 1
GET, PUT, PREFETCH = 1, 2, 3
KEY_BYTES = 16
_lib = c.CDLL(os.environ["FLEXKV_LIB"])
_lib.flexkv_last_error.restype = c.c_char_p
_lib.flexkv_keys_from_tokens.restype = c.c_size_t


class Failed(OSError):
    pass


def _check(rc: int) -> int:
    if rc < 0:
        raise Failed(-rc, _lib.flexkv_last_error().decode())
    return rc


def _numbers(values):
    return (c.c_uint32 * len(values))(*values)


class Agent:
    def __init__(self, address: str, space: str, instance: str, worker: int, regions) -> None:
        desc = AgentDesc(c.sizeof(AgentDesc), address.encode(), space.encode(), instance.encode(), worker, worker, 0, 1, 0)
        self._regions = (Region * len(regions))(*(Region(*r) for r in regions))
        self._agent = c.c_void_p()
        _check(_lib.flexkv_agent_create(c.byref(desc), self._regions, c.c_size_t(len(regions)), c.byref(self._agent)))

    def state(self) -> int:
        return _lib.flexkv_agent_state(self._agent)

    def close(self) -> None:
        _lib.flexkv_agent_close(self._agent)

    def revoke(self, ops, timeout_ms: int) -> bool:
        return _lib.flexkv_agent_revoke(self._agent, (c.c_uint64 * len(ops))(*ops), c.c_size_t(len(ops)), timeout_ms) == 0


class Node:
    """A node of this process where listen is true, else that of the daemon. What is set comes from the environment."""

    def __init__(self, address: str, listen: bool) -> None:
        self._node = c.c_void_p()
        if not listen:
            _check(_lib.flexkv_node_connect(None, address.encode(), c.byref(self._node)))
            return
        _check(_lib.flexkv_node_open(None, c.byref(self._node)))
        try:
            _check(_lib.flexkv_node_listen(self._node, address.encode()))
        except Failed:
            self.close()
            raise

    def open(self, space: str, instance: str, workers: int, tokens: int, wait_ms: int) -> None:
        desc = SpaceDesc(c.sizeof(SpaceDesc), space.encode(), b"model", 5, tokens, workers, 0, instance.encode(), workers,
                         wait_ms)
        space_handle, ns = c.c_void_p(), c.c_void_p()
        _check(_lib.flexkv_space_open(self._node, c.byref(desc), c.byref(space_handle)))
        _check(_lib.flexkv_namespace_open(space_handle, None, c.c_size_t(0), c.byref(ns)))
        self._space, self._ns, self._tokens = space_handle, ns, tokens

    def set_compute_rate(self, tokens_per_second: float) -> None:
        _check(_lib.flexkv_space_set_compute_rate(self._space, c.c_double(tokens_per_second)))

    def keys(self, tokens) -> bytes:
        blocks = len(tokens) // self._tokens
        keys = (Key * blocks)()
        assert _lib.flexkv_keys_from_tokens(self._ns, None, _numbers(tokens), c.c_size_t(len(tokens)), keys) == blocks
        return bytes(keys)

    def match(self, keys: bytes) -> MatchResult:
        found = MatchResult()
        _check(_lib.flexkv_match(self._ns, keys, c.c_size_t(len(keys) // KEY_BYTES), c.byref(found)))
        return found

    def release(self, lease: int) -> None:
        _check(_lib.flexkv_release(self._node, c.c_uint64(lease)))

    def get(self, lease: int, first: int, pages, timeout_ms: int) -> int:
        op, args = c.c_uint64(), self._args(pages, timeout_ms)
        _check(_lib.flexkv_get(self._node, c.c_uint64(lease), first, len(pages), c.byref(args), c.byref(op)))
        return op.value

    def put(self, keys: bytes, first: int, pages, timeout_ms: int) -> int:
        op, args = c.c_uint64(), self._args(pages, timeout_ms)
        _check(_lib.flexkv_put(self._ns, keys, len(keys) // KEY_BYTES, first, c.byref(args), c.byref(op)))
        return op.value

    def prefetch(self, keys: bytes) -> int:
        op, args = c.c_uint64(), self._args([], 0)
        _check(_lib.flexkv_prefetch(self._ns, keys, len(keys) // KEY_BYTES, c.byref(args), c.byref(op)))
        return op.value

    def cancel(self, op: int) -> None:
        _check(_lib.flexkv_cancel(self._node, c.c_uint64(op)))

    def poll(self, timeout_ms: int) -> list[Completion]:
        room = (Completion * 64)()
        return list(room[:_check(_lib.flexkv_poll(self._node, room, len(room), timeout_ms))])

    def reset(self) -> None:
        _check(_lib.flexkv_reset(self._node))

    def status(self) -> str:
        text = c.c_void_p()
        _check(_lib.flexkv_node_status(self._node, c.byref(text)))
        try:
            return c.string_at(text).decode()
        finally:
            c.CDLL(None).free(text)

    def close(self) -> None:
        _lib.flexkv_node_close(self._node)

    @staticmethod
    def _args(pages, timeout_ms: int) -> OpArgs:
        return OpArgs(c.sizeof(OpArgs), c.cast(_numbers(pages), c.c_void_p), timeout_ms, None, None)
