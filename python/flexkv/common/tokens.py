"""Token ids, masks and slot mappings, whatever they come as: tensors, arrays or lists.

Everything here is on the scheduler's critical path: a few numpy calls per request, no loop per token.
"""
from __future__ import annotations

from typing import Any

import numpy as np


def _as_array(values: Any, what: str) -> np.ndarray:
    if hasattr(values, "detach"):            # a torch.Tensor
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{what} must have one dimension, not {array.ndim}")
    return array


def _as_integers(values: Any, what: str) -> np.ndarray:
    array = _as_array(values, what)
    if array.dtype == np.int64 or array.dtype == np.int32:
        return array
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, not {array.dtype}")
    return array.astype(np.int64)


def as_tokens(token_ids: Any) -> np.ndarray:
    return np.ascontiguousarray(_as_integers(token_ids, "token_ids"))


def masked_blocks(token_mask: Any, n_tokens: int, tokens_per_block: int) -> tuple[int, int]:
    """The whole blocks (first, end) that a mask marks; no mask marks all.

    The mask is one run of True. It begins at a block's start: a block is moved whole, so the
    tokens before it in the block would be moved too."""
    if token_mask is None:
        return 0, n_tokens // tokens_per_block
    mask = _as_array(token_mask, "token_mask")
    if mask.size != n_tokens:
        raise ValueError(f"token_mask has {mask.size} entries for {n_tokens} tokens")
    if mask.dtype != np.bool_:
        mask = mask.astype(np.bool_)
    marked = int(np.count_nonzero(mask))
    if marked == 0:
        return 0, 0
    first = int(mask.argmax())
    if not mask[first:first + marked].all():
        raise ValueError("token_mask must be one run of True")
    end = (first + marked) // tokens_per_block
    if first % tokens_per_block:
        raise ValueError(f"token_mask begins at token {first}, inside a block of "
                         f"{tokens_per_block}; only whole blocks are moved")
    return first // tokens_per_block, max(end, first // tokens_per_block)


def block_mask(n_tokens: int, first: int, end: int, tokens_per_block: int) -> np.ndarray:
    """True for the tokens of blocks [first, end)."""
    mask = np.zeros(n_tokens, dtype=np.bool_)
    mask[first * tokens_per_block:end * tokens_per_block] = True
    return mask


def pages_of(slot_mapping: Any, skip: int, blocks: int, tokens_per_block: int) -> np.ndarray:
    """The pages of `blocks` blocks; their slots begin at entry `skip` of the mapping.

    A slot is page * tokens_per_block + offset. The offsets of a block's slots count up from 0, or
    are all 0, as some engines write it. Anything else would move a block to a wrong place."""
    slots = _as_integers(slot_mapping, "slot_mapping")
    end = skip + blocks * tokens_per_block
    if slots.size < end:
        raise ValueError(f"slot_mapping has {slots.size} entries; {blocks} blocks of "
                         f"{tokens_per_block} tokens, after {skip} entries for tokens that are "
                         f"not moved, need {end}")
    slots = slots[skip:end]
    firsts = slots[::tokens_per_block]
    pages = firsts // tokens_per_block
    steps = slots[1:] - slots[:-1]
    if not ((_within_blocks(steps, 1, tokens_per_block)
             or _within_blocks(steps, 0, tokens_per_block))
            and np.array_equal(pages * tokens_per_block, firsts)):
        raise ValueError(_bad_block(slots.reshape(blocks, tokens_per_block), skip))
    if blocks and int(pages.min()) < 0:
        raise ValueError("slot_mapping has a negative slot; leave out tokens that have none")
    return pages


def _within_blocks(steps: np.ndarray, step: int, tokens_per_block: int) -> bool:
    """Whether each step is this one, but for those from one block to the next."""
    equal = steps == step
    equal[tokens_per_block - 1::tokens_per_block] = True
    return bool(equal.all())


def _bad_block(rows: np.ndarray, skip: int) -> str:
    tokens = rows.shape[1]
    good = (rows == rows[:, :1] // tokens * tokens + np.arange(tokens)).all(axis=1)
    bad = int(np.argmin(good))
    return (f"slot_mapping from entry {skip + bad * tokens}: {rows[bad].tolist()} is not one whole "
            f"page of {tokens} slots in order")
