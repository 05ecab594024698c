"""Chained 64-bit hashes of token blocks, for callers that keep books of their own.

The node has keys of its own (docs/keys.md): 128 bits, bound to the space. These here are plain
BLAKE2b over the tokens' bytes, stable across runs and machines of one byte order.
"""
from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    import numpy as np

HashType = NewType("HashType", int)

_HASH_BYTES = 8


def get_hash_size() -> int:
    return _HASH_BYTES


class Hasher:
    """Incremental: digest() covers everything since reset()."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._state = hashlib.blake2b(digest_size=_HASH_BYTES)

    def update(self, array: np.ndarray) -> None:
        import numpy as np
        self._state.update(np.ascontiguousarray(array).data)

    def digest(self) -> HashType:
        return HashType(int.from_bytes(self._state.digest(), "little"))


def hash_array(array: np.ndarray) -> HashType:
    hasher = Hasher()
    hasher.update(array)
    return hasher.digest()


def gen_hashes(token_ids: np.ndarray, tokens_per_block: int,
               hasher: Hasher | None = None) -> np.ndarray:
    """One hash per whole block, each of which covers all blocks before it (and whatever the
    hasher has seen)."""
    import numpy as np
    if token_ids.dtype != np.int64:
        raise TypeError(f"token_ids must be int64, not {token_ids.dtype}: the same tokens in "
                        "another width would hash differently")
    if tokens_per_block <= 0:
        raise ValueError(f"tokens_per_block must be positive, not {tokens_per_block}")
    hasher = hasher or Hasher()
    hashes = np.empty(token_ids.size // tokens_per_block, dtype=np.uint64)
    for i in range(hashes.size):
        hasher.update(token_ids[i * tokens_per_block:(i + 1) * tokens_per_block])
        hashes[i] = hasher.digest()
    return hashes
