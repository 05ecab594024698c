"""The engine's KV cache groups as FlexKV sees them: which layers share a block table, how many
tokens a block has, and which of a request's blocks a load must bring.

The scheduler's and the workers' processes work this out for themselves and must come to the same
result. What they are given differs in details (layer names, wrapped specifications), so only what
is the same in both is used.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FULL = "full"           # every block of the prefix is needed
WINDOW = "window"       # only the blocks that a sliding window still reaches
CHUNK = "chunk"         # only the blocks of the current chunk

# By the names of vLLM's specification classes: a class derived from one of these may give blocks
# another meaning, so the names must be the very ones.
_KINDS = {
    "FullAttentionSpec": FULL,
    "MLAAttentionSpec": FULL,
    "TQFullAttentionSpec": FULL,
    "SlidingWindowSpec": WINDOW,
    "SlidingWindowMLASpec": WINDOW,
    "ChunkedLocalAttentionSpec": CHUNK,
}


class Unsupported(Exception):
    """This engine's KV can't be cached; the text says why."""


@dataclass(frozen=True)
class Group:
    index: int                  # in the engine's lists of block tables
    kind: str
    block_size: int             # tokens
    reach: int                  # of a window or chunk, tokens; 0 for full attention
    layers: tuple[str, ...]     # of this process; () where it does not know them

    @property
    def partial(self) -> bool:
        """Blocks that attention no longer reaches are taken from the request as it goes on."""
        return self.kind != FULL


def groups_of(vllm_config: Any, kv_cache_config: Any | None) -> list[Group]:
    """The groups to be cached. Without kv_cache_config (vLLM's own connector class keeps it to
    itself) there is one group of full attention, as the engine uses no other then."""
    _refuse_context_parallel(vllm_config)
    if kv_cache_config is None:
        return [Group(0, FULL, int(vllm_config.cache_config.block_size), 0, ())]
    groups = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if not _cacheable(group):
            continue
        specs = _specs(group.kv_cache_spec)
        kinds = {_kind(spec) for spec in specs}
        if len(kinds) != 1:
            raise Unsupported(f"KV cache group {index} mixes {_names(specs)}")
        kind = kinds.pop()
        groups.append(Group(index, kind, int(group.kv_cache_spec.block_size),
                            _reach(kind, specs), tuple(group.layer_names)))
    if not groups:
        raise Unsupported("the model has no KV cache that outlives a request")
    return groups


def alignment(groups: list[Group]) -> int:
    """Tokens in the smallest prefix that ends with a block in every group."""
    return math.lcm(*(g.block_size for g in groups))


def hash_block_size(vllm_config: Any, kv_cache_config: Any | None, groups: list[Group]) -> int:
    """Tokens covered by each of a request's block hashes."""
    for config, name in ((kv_cache_config, "hash_block_size"),
                         (vllm_config.cache_config, "hash_block_size"),
                         (vllm_config.cache_config, "prefix_match_unit")):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return math.gcd(*(g.block_size for g in groups))


def _refuse_context_parallel(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Unsupported(f"{name} is {getattr(parallel, name)}: a block is then spread over "
                              "ranks in a way FlexKV does not know")


def _cacheable(group: Any) -> bool:
    """Some groups hold what the engine rebuilds after every hit, also after one of its own."""
    if getattr(group, "host_resident", False):
        raise Unsupported("a KV cache group lives in host memory")
    if not getattr(group, "enable_kv_transfer", True):
        return False
    return bool(getattr(group.kv_cache_spec, "prefix_cacheable", True))


def _specs(spec: Any) -> list[Any]:
    """The layers' specifications where a group's one is a collection of them."""
    inner = getattr(spec, "kv_cache_specs", None)
    return list(inner.values()) if inner else [spec]


def _kind(spec: Any) -> str:
    name = type(spec).__name__
    kind = _KINDS.get(name)
    if kind is None:
        raise Unsupported(f"KV of the kind {name} can't be cached by FlexKV yet")
    if getattr(spec, "non_causal", False):
        raise Unsupported(f"{name} is not causal: KV then depends on tokens that come later")
    return kind


def _reach(kind: str, specs: list[Any]) -> int:
    if kind == FULL:
        return 0
    name = "sliding_window" if kind == WINDOW else "attention_chunk_size"
    reaches = {int(getattr(spec, name)) for spec in specs}
    if len(reaches) != 1:
        raise Unsupported(f"a KV cache group has layers with different {name}: {sorted(reaches)}")
    return reaches.pop()


def _names(specs: list[Any]) -> str:
    return ", ".join(sorted({type(s).__name__ for s in specs}))
