"""An engine's pages and what its processes tell each other, in one file that its scheduler, its workers and the test
map: whoever of them dies or stands still, the others can look at every byte.

    header | worker 0: region 0, region 1 | worker 1: ...

A page in use holds what follows from its block's key, worker and region. A free page holds a mark of its own: if that
has changed when the page is taken again, somebody has written to a page that nobody had given him. Between pages are
gaps that nobody may write to.
"""
import ctypes
import hashlib
import mmap
import struct
from pathlib import Path

PAGES = 96
WORKERS = 2
REGION_BYTES = (48000, 17536)       # of a page: large, so that copies take their time
GAP = 24
GAP_BYTES = b"\xee" * GAP
HEADER = 4096
OPS_AT, OPS_MAX = 2048, 200         # operations to be revoked

# 8-byte numbers of the header.
FIELDS = ("phase", "pauses", "heartbeat", "ops_open", "puts_ok", "gets_ok", "blocks_ok", "misses", "refused", "failed",
          "busy", "cancelled", "wrong", "late", "revoke_asked", "revoke_count", "revoke_done_0", "revoke_done_1",
          "state_0", "state_1")
RUN, REST, LEAVE = 0, 1, 2          # phases: traffic; all operations over; out


def block_bytes(key: bytes, worker: int, region: int) -> bytes:
    """The same 61 bytes again and again: a shift by anything but a multiple of that shows."""
    size = REGION_BYTES[region]
    return (hashlib.shake_128(key + bytes([worker, region])).digest(61) * (size // 61 + 1))[:size]


def mark(page: int, worker: int, region: int) -> bytes:
    return bytes([0x40 + (page * 7 + worker * 3 + region) % 0x40]) * REGION_BYTES[region]


class Memory:
    def __init__(self, path: Path, create: bool = False) -> None:
        strides = [size + GAP for size in REGION_BYTES]
        self._per_worker = PAGES * sum(strides)
        size = HEADER + WORKERS * self._per_worker
        if create:
            path.write_bytes(bytes(size))
        with open(path, "r+b") as f:
            self._map = mmap.mmap(f.fileno(), size)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if create:
            for worker in range(WORKERS):
                for region in range(len(REGION_BYTES)):
                    for page in range(PAGES):
                        at = self._at(page, worker, region) + REGION_BYTES[region]
                        self._map[at:at + GAP] = GAP_BYTES

    # ---- the header ----

    def __getitem__(self, field: str) -> int:
        return struct.unpack_from("<Q", self._map, 8 * FIELDS.index(field))[0]

    def __setitem__(self, field: str, value: int) -> None:
        struct.pack_into("<Q", self._map, 8 * FIELDS.index(field), value & (1 << 64) - 1)

    def count(self, field: str, n: int = 1) -> None:
        self[field] += n

    def write_ops(self, ops) -> None:
        struct.pack_into(f"<{len(ops)}Q", self._map, OPS_AT, *ops)
        self["revoke_count"] = len(ops)

    def read_ops(self) -> list[int]:
        return list(struct.unpack_from(f"<{self['revoke_count']}Q", self._map, OPS_AT))

    # ---- pages ----

    def _at(self, page: int, worker: int, region: int) -> int:
        before = sum((size + GAP) * PAGES for size in REGION_BYTES[:region])
        return HEADER + worker * self._per_worker + before + page * (REGION_BYTES[region] + GAP)

    def regions(self, worker: int) -> list[tuple[int, int, int, int]]:
        return [(self._base + self._at(0, worker, region), size + GAP, size, PAGES)
                for region, size in enumerate(REGION_BYTES)]

    def _pieces(self, page: int):
        for worker in range(WORKERS):
            for region, size in enumerate(REGION_BYTES):
                at = self._at(page, worker, region)
                yield worker, region, at, at + size

    def fill(self, page: int, key: bytes) -> None:
        for worker, region, start, end in self._pieces(page):
            self._map[start:end] = block_bytes(key, worker, region)

    def holds(self, page: int, key: bytes) -> bool:
        return all(self._map[start:end] == block_bytes(key, worker, region) and self._map[end:end + GAP] == GAP_BYTES
                   for worker, region, start, end in self._pieces(page))

    def free(self, page: int) -> None:
        for worker, region, start, end in self._pieces(page):
            self._map[start:end] = mark(page, worker, region)

    def untouched(self, page: int) -> bool:
        return all(self._map[start:end] == mark(page, worker, region) and self._map[end:end + GAP] == GAP_BYTES
                   for worker, region, start, end in self._pieces(page))

    def describe(self, page: int) -> str:
        """For reports: the first bytes of each piece."""
        return " ".join(self._map[start:start + 8].hex() for _, _, start, _ in self._pieces(page))
