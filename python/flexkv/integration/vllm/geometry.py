"""A worker's KV tensors as regions of pages.

FlexKV takes a page as opaque bytes: base address, distance from page to page, bytes. What makes up
the page of one block in one layer follows from the tensor's shape and strides alone, so every
layout works whose blocks are made of contiguous runs: K and V apart or packed, heads before or
after tokens, padded rows, several layers in one allocation, blocks that the attention kernel
sees as several smaller ones.

The order of regions is the order of bytes in a stored block. It must be the same in all processes
and runs: layers by name, numbers in names as numbers; within a layer by address.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

Region = tuple[int, int, int, int]      # base address, stride, page bytes, pages

DEVICES = ("cpu", "cuda")       # agents see by an address which of them it is
MOST_RUNS = 1024        # of one tensor; more would make copying a matter of tiny pieces


class GeometryError(Exception):
    """The text names the tensor and says what about it can't be handled."""


def layer_order(names: Iterable[str]) -> list[str]:
    def parts(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(p), "") if p.isdigit() else (1, 0, p)
                for p in re.split(r"(\d+)", name) if p]
    return sorted(names, key=parts)


def group_regions(layers: Mapping[str, Any], num_blocks: int) -> tuple[list[Region], list[int]]:
    """The regions of the layers' tensors, and how many begin with each layer, in order. Layers that
    share a tensor count once."""
    regions: list[Region] = []
    counts: list[int] = []
    seen: set[Region] = set()
    for name in layer_order(layers):
        before = len(regions)
        for region in tensor_regions(name, layers[name], num_blocks):
            if region not in seen:
                seen.add(region)
                append(regions, region)
        counts.append(len(regions) - before)
    return regions, counts


def tensor_regions(name: str, tensor: Any, num_blocks: int) -> list[Region]:
    if isinstance(tensor, (list, tuple)):
        raise GeometryError(f"the KV cache of {name} is {len(tensor)} tensors, not one")
    if tensor.device.type not in DEVICES:
        raise GeometryError(f"the KV cache of {name} is on {tensor.device}: FlexKV copies from and "
                            "to host memory and CUDA devices only; leave out --kv-transfer-config, "
                            "or set ENABLE_FLEXKV=0")
    item = tensor.element_size()
    return regions_of(name, tensor.data_ptr(), tuple(tensor.shape),
                      tuple(s * item for s in tensor.stride()), item, num_blocks)


def regions_of(name: str, base: int, shape: tuple[int, ...], strides: tuple[int, ...], item: int,
               num_blocks: int) -> list[Region]:
    """shape in elements, strides in bytes; dimension 0 counts blocks, or kernel blocks which
    are whole fractions of a block, or K and V."""
    what = f"the KV cache of {name}, shape {shape}, strides {strides} bytes, {num_blocks} blocks"
    if not shape or num_blocks <= 0:
        raise GeometryError(f"{what}: there are no blocks")
    if shape[0] % num_blocks == 0:
        return _block_first(what, base, shape, strides, item, num_blocks)
    if len(shape) > 2 and shape[0] == 2 and shape[1] % num_blocks == 0:
        return [region for half in range(2) for region in _block_first(
            what, base + half * strides[0], shape[1:], strides[1:], item, num_blocks)]
    raise GeometryError(f"{what}: no dimension counts blocks")


def _block_first(what: str, base: int, shape: tuple[int, ...], strides: tuple[int, ...],
                 item: int, num_blocks: int) -> list[Region]:
    per_block = shape[0] // num_blocks
    stride = per_block * strides[0]
    inner = [(per_block, strides[0]), *zip(shape[1:], strides[1:])]
    run, outer = _longest_run(what, inner, item)
    offsets = sorted(sum(o) for o in itertools.product(
        *([i * step for i in range(count)] for count, step in outer)))
    if len(offsets) > MOST_RUNS:
        raise GeometryError(f"{what}: a block is in {len(offsets)} pieces of {run} bytes")
    if stride < run and num_blocks > 1:
        raise GeometryError(f"{what}: blocks overlap")
    return [(base + offset, stride, run, num_blocks) for offset in offsets]


def _longest_run(what: str, dims: list[tuple[int, int]],
                 item: int) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of the contiguous run that the innermost dimensions make, and the dimensions outside
    of it, as (count, stride)."""
    run, outer = item, []
    for count, step in sorted((d for d in dims if d[0] != 1), key=lambda d: d[1]):
        if step == run and not outer:
            run *= count
        elif step < run:
            raise GeometryError(f"{what}: elements overlap")
        else:
            outer.append((count, step))
    return run, outer


def append(regions: list[Region], region: Region) -> None:
    """Neighbours as one region: the bytes and their order stay the same, copies get longer."""
    base, stride, page, pages = region
    if regions:
        b, s, p, n = regions[-1]
        if b + p == base and s == stride and n == pages and p + page <= stride:
            regions[-1] = (b, s, p + page, n)
            return
    regions.append(region)
