"""The extension module: libflexkv's C API (include/flexkv/flexkv.h) as Python objects.

Failures raise flexkv.Error (an OSError with errno and the library's message), wrong arguments ValueError or
TypeError. Calls that may take time release the GIL; those that take microseconds (match, put, get, prefetch,
poll without waiting, keys, ...) keep it while the node is in this process, and release it when a daemon serves
the node. Any thread may use any object. An object that was closed raises Error(EBADF); closing waits for
calls under way and ends a waiting poll. Spaces and namespaces keep their node alive. Nodes and agents that are
left open are closed when they are collected, or when the interpreter ends. None of them survives fork().
"""
from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

from typing_extensions import Buffer, Self

class Error(OSError): ...

def version() -> str: ...

OP_GET: int
OP_PUT: int
OP_PREFETCH: int
PAGES_BUSY: int
EARLY: int

# Page numbers, one per block: a list of int, or a C-contiguous buffer of 4- or 8-byte integers.
Pages = Sequence[int] | Buffer
# Token ids: a list of int, or a C-contiguous buffer of 4- or 8-byte integers.
Tokens = Sequence[int] | Buffer
# The engine's block hashes: ints (the lowest 64 bits count), bytes (the last 8, big-endian), or a
# buffer of 8-byte integers.
_EventHashes = Sequence[int] | Sequence[bytes] | Buffer
# (base address, stride, page bytes, pages)
Region = tuple[int, int, int, int]

@final
class Config:
    def __init__(self) -> None: ...
    def load_default(self) -> None: ...
    def load_file(self, path: str) -> None: ...
    def load_env(self) -> None: ...
    def set(self, key: str, value: str) -> None:
        """Error(ENOENT): unknown key; Error(EBUSY): a node was opened with it, or a value was read."""
    def get(self, key: str) -> str:
        """The effective value of an option as text; "" when empty. Error(ENOENT): unknown key.

        Nothing can be set or loaded afterwards.
        """

@final
class Completion(tuple[int, int, int, int, int, int]):
    """A tuple-like record (struct sequence)."""
    op: int
    kind: int
    status: int          # 0 or -errno
    blocks: int
    blocks_ok: int
    flags: int           # PAGES_BUSY, EARLY

@final
class Match(tuple[int, int, int, int, int]):
    """Struct sequence; lease 0 when blocks is 0."""
    lease: int
    blocks: int
    cpu_blocks: int
    ssd_blocks: int
    peer_blocks: int

@final
class Node:
    closed: bool
    @staticmethod
    def open(config: Config | None = None) -> Node: ...
    @staticmethod
    def connect(address: str, config: Config | None = None) -> Node: ...
    def listen(self, address: str) -> None: ...
    def serve(self, address: str) -> None: ...
    def wait_idle(self, idle_ms: int, timeout_ms: int = -1) -> bool:
        """True once the served node has had no client for idle_ms; the first minute of its life does
        not count, unless a client has come and gone. False: the time is up. A signal's handler runs
        meanwhile, and ends the wait if it raises."""
    def space(self, name: str | None = None, *, fingerprint: bytes = b"", tokens_per_block: int,
              ranks: int = 1, slice_bytes: int = 0, instance: str = "", workers: int = 0,
              wait_ms: int = 0) -> Space: ...
    def events(self, space: Space | None = None) -> Events:
        """KV events of one space, or of all. Error(EOPNOTSUPP): enable_kv_events is off."""
    def release(self, lease: int) -> None: ...
    def get(self, lease: int, first: int, pages: Pages, timeout_ms: int = 0,
            layerwise: bool = False, counter: int = 0, early: bool = False) -> int:
        """Starts a get of blocks [first, first + len(pages)); returns the operation's number.

        layerwise: all blocks' first layer first, and so on; see Agent.wait_layer.
        counter: 1 + the layer counter that the agents move; see Agent.serve_layers.
        early: into a GPU's memory it may be reported, with EARLY, when all of it is on its way; see
        Agent.wait_loaded.
        """
    def cancel(self, op: int) -> bool:
        """False: it has ended already."""
    def poll(self, max: int = 256, timeout_ms: int = 0) -> list[Completion]:
        """At most 256 at a time. Waits for the first one; -1: no limit. A signal's handler runs
        meanwhile, and ends the wait if it raises."""
    def reset(self) -> None: ...
    def stats(self) -> dict[str, Any]:
        """Names as in flexkv_stats; "cpu", "ssd" and "peer" are dicts."""
    def status(self) -> str:
        """JSON, as `flexkv status --json` prints it."""
    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None: ...

@final
class Space:
    name: str
    tokens_per_block: int
    def namespace(self, *parts: str) -> Namespace: ...
    def register(self, rank: int, regions: Sequence[Region]) -> None:
        """The memory must stay where it is until unregister, or until the node is closed."""
    def unregister(self, rank: int) -> None: ...
    def set_compute_rate(self, tokens_per_second: float) -> None: ...

@final
class Namespace:
    def keys_from_tokens(self, tokens: Tokens, prev: bytes | None = None) -> bytes:
        """16 bytes per whole block."""
    def keys_from_hashes(self, hashes: Sequence[bytes]) -> bytes: ...
    def match(self, keys: Buffer) -> Match: ...
    def put(self, keys: Buffer, first: int, pages: Pages, timeout_ms: int = 0,
            event_hashes: _EventHashes | None = None, event_tokens: Tokens | None = None,
            event_parent: int | bytes | None = None) -> int:
        """Stores blocks [first, len(keys) / 16); pages[0] belongs to block first.

        For KV events: the engine's hashes of these blocks, their tokens (more are ignored), the hash
        of block first - 1. Without hashes the blocks make no events.
        """
    def label(self, lora_name: str | None = None, cache_salt: str | None = None) -> None:
        """How routers know the namespace; for events of blocks put from now on."""
    def prefetch(self, keys: Buffer, timeout_ms: int = 0) -> int: ...

# (stored, medium: "CPU", "STORAGE" or "EXTERNAL", hashes, parent, token ids, tokens per block, LoRA name,
# cache salt); of removed blocks only the first three say something
_Event = tuple[bool, str, list[int], int | None, list[int], int, str | None, str | None]

@final
class Events:
    """First all that is there is announced, then what changes; each residency exactly once."""
    def take(self, max_blocks: int = 4096) -> list[_Event]:
        """[] when there is nothing. Does not wait. Blocks that follow each other go in one tuple."""
    def again(self) -> None:
        """The receiver has forgotten everything: what is there is announced anew."""
    def fileno(self) -> int:
        """Readable when there may be something to take."""
    def close(self) -> None: ...

@final
class Agent:
    closed: bool
    error: str           # why the node turned it away; "" when it did not
    def __init__(self, address: str, regions: Sequence[Region], *, space: str | None = None,
                 instance: str = "", worker: int = 0, slice: int = 0, replica: int = 0,
                 replicas: int = 1, timeout_ms: int = 0,
                 layers: Sequence[int] | None = None) -> None:
        """The memory must stay where it is until close. layers: how many of the regions each layer
        has, in order, for gets with layerwise."""
    def state(self) -> int:
        """1 registered, 0 looking for the node, -errno turned away."""
    def revoke(self, ops: Sequence[int], timeout_ms: int = 5000) -> bool:
        """False: a copy did not stop in time."""
    def wait_layer(self, ops: Sequence[int], layer: int, stream: int, timeout_ms: int) -> int:
        """The CUDA stream (a cudaStream_t as a number) waits for the layer's pages of these
        operations; 0, for host memory: the caller does. 0 or -errno."""
    def wait_loaded(self, ops: Sequence[int], stream: int) -> None:
        """The CUDA stream waits for the pages of these operations, which were reported EARLY."""
    def serve_layers(self, address: str) -> None:
        """Takes an engine's eventfds at a unix socket, one for each layer and counter; a get with
        counter adds 1 to each as its layer is loaded."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None: ...
