"""How an engine's KV cache lies in memory: the layout's name, its shape and its strides.

Shapes, outermost dimension first (B blocks, L layers, T tokens of a block, H heads of this rank,
D head size, kv 2 for K and V, 1 for one combined buffer):

    LAYERFIRST   L kv B T H D
    BLOCKFIRST   B L kv T H D
    LAYERBLOCK   L B kv T H D
    with layer_groups (BLOCKFIRST only): B x bytes of a block, the groups one after the other
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from flexkv.common.dtypes import dtype_bytes


class KVCacheLayoutType(Enum):
    LAYERFIRST = "LAYERFIRST"
    BLOCKFIRST = "BLOCKFIRST"
    LAYERBLOCK = "LAYERBLOCK"


class Shape(tuple):
    """A tuple that can say how many elements it has, like torch.Size."""

    def numel(self) -> int:
        return math.prod(self)

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return Shape(part) if isinstance(key, slice) else part


_ORDER = {
    KVCacheLayoutType.LAYERFIRST: ("layer", "kv", "block"),
    KVCacheLayoutType.BLOCKFIRST: ("block", "layer", "kv"),
    KVCacheLayoutType.LAYERBLOCK: ("layer", "block", "kv"),
}


@dataclass(init=False)
class KVCacheLayout:
    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    kv_dim: int
    num_kv_heads: int
    layer_groups: list[Any] | None
    tp_size: int

    def __init__(self, type: KVCacheLayoutType, num_layer: int, num_block: int,
                 tokens_per_block: int, num_head: int | None = None, head_size: int = 0,
                 kv_dim: int | None = None, num_kv_heads: int | None = None,
                 layer_groups: list[Any] | None = None, tp_size: int = 1, *,
                 is_mla: bool | None = None) -> None:
        # Older callers say is_mla instead of kv_dim, some of them in its position.
        if isinstance(kv_dim, bool):
            kv_dim, is_mla = None, kv_dim
        if is_mla is not None:
            derived = 1 if is_mla else 2
            if kv_dim is not None and kv_dim != derived:
                raise ValueError(f"is_mla={is_mla} and kv_dim={kv_dim} contradict each other")
            kv_dim = derived
        if num_head is None:
            if num_kv_heads is None:
                raise ValueError("a layout needs num_head, the KV heads that lie on this rank")
            num_head = num_kv_heads
        self.type = KVCacheLayoutType(type)
        self.num_layer = num_layer
        self.num_block = num_block
        self.tokens_per_block = tokens_per_block
        self.num_head = num_head
        self.head_size = head_size
        self.kv_dim = 2 if kv_dim is None else kv_dim
        self.num_kv_heads = 1 if num_kv_heads is None else num_kv_heads
        self.layer_groups = layer_groups
        self.tp_size = tp_size
        self._check()

    def _check(self) -> None:
        if self.kv_dim not in (1, 2):
            raise ValueError(f"kv_dim must be 2 (K and V) or 1 (one buffer), not {self.kv_dim}")
        if self.layer_groups is None:
            return
        if self.type != KVCacheLayoutType.BLOCKFIRST:
            raise ValueError("layer_groups need the BLOCKFIRST layout: the groups lie one after "
                             f"the other in each block, which {self.type.value} can't express")
        for i, group in enumerate(self.layer_groups):
            if group.dtype is None:
                raise ValueError(f"layer_groups[{i}].dtype is missing; groups may differ in it, "
                                 "so each must name its own")
            if self.tokens_per_block % group.compress_ratio:
                raise ValueError(
                    f"layer_groups[{i}].compress_ratio {group.compress_ratio} does not divide "
                    f"tokens_per_block {self.tokens_per_block}")

    @property
    def is_mla(self) -> bool:
        return self.kv_dim == 1

    @property
    def kv_shape(self) -> Shape:
        if self.layer_groups is not None:
            return Shape((self.num_block, self._group_block_bytes()))
        sizes = {"layer": self.num_layer, "kv": self.kv_dim, "block": self.num_block}
        outer = tuple(sizes[dim] for dim in _ORDER[self.type])
        return Shape(outer + (self.tokens_per_block, self.num_head, self.head_size))

    def _group_block_bytes(self) -> int:
        """Bytes of one block: every rank's share of every group."""
        assert self.layer_groups is not None
        return self.tp_size * sum(
            self._group_elements(group) * group.num_layers * dtype_bytes(group.dtype)
            for group in self.layer_groups)

    def _group_elements(self, group: Any) -> int:
        """Elements of one layer of the group in one block, K and V together."""
        tokens = self.tokens_per_block // group.compress_ratio
        return self.kv_dim * tokens * group.num_kv_heads * group.head_size

    def div_block(self, num_chunks: int, padding: bool = False) -> KVCacheLayout:
        if not padding and self.num_block % num_chunks:
            raise ValueError(f"{self.num_block} blocks can't be divided by {num_chunks}")
        return replace(self, num_block=-(-self.num_block // num_chunks))

    def div_layer(self, num_chunks: int) -> KVCacheLayout:
        if self.num_layer % num_chunks:
            raise ValueError(f"{self.num_layer} layers can't be divided by {num_chunks}")
        return replace(self, num_layer=self.num_layer // num_chunks)

    def div_head(self, num_chunks: int) -> KVCacheLayout:
        if self.num_head % num_chunks:
            raise ValueError(f"{self.num_head} heads can't be divided by {num_chunks}")
        return replace(self, num_head=self.num_head // num_chunks)

    def _uniform(self, what: str) -> None:
        if self.layer_groups is not None:
            raise ValueError(f"{what} has no meaning with layer_groups; see get_group_strides")

    def get_chunk_size(self) -> int:
        """Elements of one block in one layer, K or V."""
        self._uniform("get_chunk_size")
        return self.tokens_per_block * self.num_head * self.head_size

    def _stride(self, dim: str) -> int:
        return self.kv_shape[_ORDER[self.type].index(dim) + 1:].numel()

    def get_layer_stride(self) -> int:
        self._uniform("get_layer_stride")
        return self._stride("layer")

    def get_block_stride(self) -> int:
        """In elements; with layer_groups in bytes."""
        return self.kv_shape[1] if self.layer_groups is not None else self._stride("block")

    def get_kv_stride(self) -> int:
        self._uniform("get_kv_stride")
        return self._stride("kv")

    def get_group_strides(self) -> list[dict[str, Any]]:
        """Where each group lies in a block, in elements of its own type."""
        if self.layer_groups is None:
            raise ValueError("this layout has no layer_groups")
        strides, offset = [], 0
        for group in self.layer_groups:
            layer = self._group_elements(group)
            strides.append({
                "num_layers": group.num_layers,
                "num_kv_heads": group.num_kv_heads,
                "head_size": group.head_size,
                "layer_indices": group.layer_indices,
                "offset_elements": offset,
                "layer_stride": layer,
                "kv_stride": layer // self.kv_dim,
                "chunk_size": layer // self.kv_dim,
            })
            offset += group.num_layers * layer
        return strides

    def get_total_elements(self) -> int:
        return self.kv_shape.numel()

    def get_elements_per_block(self) -> int:
        return self.get_total_elements() // self.num_block
