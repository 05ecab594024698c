"""A token sequence with the hashes of its blocks (see hash_utils: for the caller's own books)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexkv.common.hash_utils import Hasher, HashType, gen_hashes

if TYPE_CHECKING:
    import numpy as np


def namespace_parts(namespace: Sequence[str] | str | None) -> tuple[str, ...]:
    """The parts that name a namespace; None, [] and "" mean the default one."""
    if not namespace:
        return ()
    if isinstance(namespace, str):
        return (namespace,)
    return tuple(str(part) for part in namespace)


def _namespace_hasher(namespace: Sequence[str] | None) -> tuple[Hasher, int | None]:
    """A hasher that has seen the namespace, and the namespace's number."""
    import numpy as np
    hasher = Hasher()
    parts = namespace_parts(namespace)
    if not parts:
        return hasher, None
    for part in parts:
        raw = part.encode()
        # The length keeps ["ab", "c"] and ["a", "bc"] apart.
        hasher.update(np.array([len(raw)], dtype=np.int64))
        hasher.update(np.frombuffer(raw, dtype=np.uint8))
    return hasher, hasher.digest()


def hash_token(token_ids: np.ndarray, namespace: Sequence[str] | None) -> HashType:
    """One hash of all tokens, whole blocks or not."""
    hasher, _ = _namespace_hasher(namespace)
    hasher.update(token_ids)
    return hasher.digest()


def format_block_hash(value: int | None) -> str:
    """16 hexadecimal digits, whichever way the 64 bits are signed."""
    return "-" if value is None else f"{int(value) % (1 << 64):#018x}"


class SequenceMeta:
    def __init__(self, token_ids: np.ndarray, tokens_per_block: int,
                 namespace: Sequence[str] | None = None) -> None:
        if token_ids.ndim != 1:
            raise ValueError(f"token_ids must have one dimension, not {token_ids.ndim}")
        self.token_ids = token_ids
        self.tokens_per_block = tokens_per_block
        hasher, self.namespace_id = _namespace_hasher(namespace)
        self.block_hashes = gen_hashes(token_ids, tokens_per_block, hasher)

    @property
    def num_blocks(self) -> int:
        return len(self.token_ids) // self.tokens_per_block

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def get_hash(self, block_id: int) -> HashType | None:
        return HashType(int(self.block_hashes[block_id])) if block_id < self.num_blocks else None
