"""From KV cache tensors to regions: runs of pages of opaque bytes (see flexkv_region).

A page is what one block takes in one layer, K or V. Its bytes must be one run; where pages of K
and V, or of several layers, lie side by side, they become one longer page. Regions are in the order
layer, K before V, whatever the engine's own order, so that engines of different layouts share
blocks. Uses only what any tensor can say of itself: address, shape, strides, element size.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType

Region = tuple[int, int, int, int]      # base, stride, page bytes, pages
_Dim = tuple[int, int]                  # size, stride in elements


@dataclass(frozen=True)
class _View:
    """A tensor, or a part of one."""
    base: int
    item: int
    dims: tuple[_Dim, ...]

    @classmethod
    def of(cls, tensor: Any) -> _View:
        return cls(tensor.data_ptr(), tensor.element_size(),
                   tuple(zip(tensor.shape, tensor.stride())))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for size, _ in self.dims)

    def pick(self, dim: int, index: int) -> _View:
        """The part at one index of a dimension, which goes away."""
        stride = self.dims[dim][1]
        return _View(self.base + index * stride * self.item, self.item,
                     self.dims[:dim] + self.dims[dim + 1:])


def _is_one_run(dims: Sequence[_Dim]) -> bool:
    expected = 1
    for size, stride in sorted(dims, key=lambda dim: dim[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _is_head_major(dims: Sequence[_Dim], layout: KVCacheLayout) -> bool:
    """Whether heads lie outside of tokens, which would make other bytes of the same KV."""
    tokens, heads = layout.tokens_per_block, layout.num_head
    if len(dims) != 3 or tokens == 1 or heads == 1 or tokens == heads:
        return False
    if (dims[0][0], dims[1][0]) == (tokens, heads):
        return dims[1][1] > dims[0][1]
    if (dims[0][0], dims[1][0]) == (heads, tokens):
        return dims[0][1] > dims[1][1]
    return False


def _block_region(view: _View, layout: KVCacheLayout) -> Region | None:
    """The region of a view whose first dimension is blocks, or tokens, of one layer's K or V.
    None: it has not that shape."""
    tokens, blocks = layout.tokens_per_block, layout.num_block
    page = tokens * layout.num_head * layout.head_size
    if not view.dims:
        return None
    (first, stride), inner = view.dims[0], view.dims[1:]
    if first == blocks and math.prod(size for size, _ in inner) == page:
        pass
    elif first // tokens == blocks and math.prod(s for s, _ in inner) * tokens == page:
        inner = ((tokens, stride), *inner)
        stride *= tokens
    else:
        return None
    if _is_head_major(inner, layout):
        raise ValueError(
            f"the KV cache is head-major (HND): its pages {tuple(s for s, _ in inner)} have the "
            "heads outside of the tokens. Blocks are stored token-major; use the NHD layout "
            "(vLLM: leave VLLM_KV_CACHE_LAYOUT unset)")
    if not _is_one_run(inner):
        raise ValueError(f"the bytes of a page are not one run: dimensions {tuple(inner)} "
                         "(size, stride) of a KV cache tensor leave gaps")
    return view.base, stride * view.item, page * view.item, blocks


def _layer_regions(view: _View, layout: KVCacheLayout) -> list[Region] | None:
    """K's and V's region of one layer (or the one of both); None: not the layout's shape."""
    if layout.kv_dim == 1:
        region = _block_region(view, layout)
        if region is not None:
            return [region]
    kv_at = 0 if layout.type == KVCacheLayoutType.LAYERFIRST else 1
    if len(view.dims) <= kv_at or view.dims[kv_at][0] != layout.kv_dim:
        return None
    parts = [_block_region(view.pick(kv_at, kv), layout) for kv in range(layout.kv_dim)]
    return None if None in parts else parts     # type: ignore[return-value]


def _whole_regions(view: _View, layout: KVCacheLayout) -> list[Region] | None:
    """The regions of one tensor that holds all layers."""
    layer_at = 1 if layout.type == KVCacheLayoutType.BLOCKFIRST else 0
    if len(view.dims) <= layer_at or view.dims[layer_at][0] != layout.num_layer:
        return None
    layers = [_layer_regions(view.pick(layer_at, i), layout) for i in range(layout.num_layer)]
    return None if None in layers else [region for layer in layers for region in layer or ()]


def _merge_neighbours(regions: list[Region]) -> list[Region]:
    merged: list[Region] = []
    for base, stride, size, pages in regions:
        if merged:
            base0, stride0, size0, pages0 = merged[-1]
            # A merged page must still fit into its stride, or pages would overlap.
            if (base0 + size0, stride0, pages0) == (base, stride, pages) and \
                    size0 + size <= stride:
                merged[-1] = (base0, stride, size0 + size, pages)
                continue
        merged.append((base, stride, size, pages))
    return merged


def _wrong_shape(tensors: Sequence[Any], layout: KVCacheLayout) -> ValueError:
    return ValueError(
        f"{len(tensors)} KV cache tensor(s) of shape {tuple(tensors[0].shape)} don't fit the "
        f"layout: {layout.type.value} with {layout.num_layer} layers, {layout.num_block} blocks "
        f"of {layout.tokens_per_block} tokens, {layout.num_head} heads of {layout.head_size}, "
        f"kv_dim {layout.kv_dim}, in all {tuple(layout.kv_shape)}. Wanted is one tensor per "
        "layer, one per layer for K and then one per layer for V, or one for all")


def kv_regions(tensors: Sequence[Any], layout: KVCacheLayout) -> list[Region]:
    """Regions of one group of layers."""
    return _merge_neighbours([region for layer in _kv_layers(tensors, layout) for region in layer])


def _kv_layers(tensors: Sequence[Any], layout: KVCacheLayout) -> list[list[Region]]:
    if not tensors:
        raise ValueError("there are no KV cache tensors to register")
    views = [_View.of(tensor) for tensor in tensors]
    layers = layout.num_layer
    found: list[list[Region] | None]
    if len(views) == layers * layout.kv_dim and layout.kv_dim == 2:
        halves = [_block_region(view, layout) for view in views]
        found = [None if None in pair else list(pair)    # type: ignore[arg-type]
                 for pair in zip(halves[:layers], halves[layers:])]
    elif len(views) == layers and layout.type != KVCacheLayoutType.BLOCKFIRST:
        found = [_layer_regions(view, layout) for view in views]
        if None in found and len(views) == 1:
            found = [_whole_regions(views[0], layout)]
    elif len(views) == 1:
        found = [_whole_regions(views[0], layout)]
    else:
        found = [None]
    if None in found:
        raise _wrong_shape(tensors, layout)
    return [list(layer or ()) for layer in found]


def group_regions(groups: Sequence[tuple[Sequence[Any], KVCacheLayout]]) -> list[Region]:
    """Regions of several groups of layers that share their page numbers."""
    regions = [region for tensors, layout in groups for region in kv_regions(tensors, layout)]
    pages = min(region[3] for region in regions)
    return [(base, stride, size, pages) for base, stride, size, _ in regions]


def layered_regions(groups: Sequence[tuple[Sequence[Any], KVCacheLayout]]
                    ) -> tuple[list[Region], list[int]]:
    """The same, and how many of the regions each layer has: those of several groups, or of one tensor
    for all layers, are all there only when the last one is."""
    tensors, layout = groups[0]
    layers = [_merge_neighbours(layer) for layer in _kv_layers(tensors, layout)]
    if len(groups) == 1 and len(layers) == layout.num_layer:
        return [region for layer in layers for region in layer], [len(layer) for layer in layers]
    regions = group_regions(groups)
    return regions, [len(regions)] + [0] * (layout.num_layer - 1)
