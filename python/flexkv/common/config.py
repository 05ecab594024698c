"""All configuration under one roof: the model, the cache, what the user set, and how the latter
becomes the former. How it reaches the node: flexkv.common.node_config."""
from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from flexkv.common.debug import flexkv_logger
from flexkv.common.dtypes import dtype_bytes
from flexkv.common.env import GLOBAL_CONFIG_FROM_ENV, convert_override, parse_bool
from flexkv.common.model import LayerGroupSpec, ModelConfig, RankInfo
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.common.user_config import (
    UserConfig,
    load_user_config_from_env,
    load_user_config_from_file,
    parse_path_list,
)

__all__ = [
    "GLOBAL_CONFIG_FROM_ENV",
    "CacheConfig",
    "KVCacheLayout",
    "KVCacheLayoutType",
    "LayerGroupSpec",
    "ModelConfig",
    "RankInfo",
    "SWAPoolConfig",
    "UserConfig",
    "block_size_in_bytes_for_cache",
    "convert_to_block_num",
    "flexkv_logger",
    "load_user_config_from_env",
    "load_user_config_from_file",
    "parse_path_list",
    "recompute_cache_block_counts",
    "update_default_config_from_user_config",
]


@dataclass
class SWAPoolConfig:
    """Sliding-window side pools. Kept for its users' constructors: this build stores none."""
    enabled: bool = False
    num_slots: int = 1024
    num_ssd_slots: int = 0
    num_remote_slots: int = 0
    num_swa_layers: int = 61
    bytes_per_token_per_layer: int = 584
    multi_group: bool = False
    evict_ratio: float = 0.1
    pin_memory: bool = True


@dataclass
class CacheConfig:
    tokens_per_block: int = 16
    eviction_policy: str = "lru"
    enable_cpu: bool = True
    enable_ssd: bool = False
    enable_gds: bool = False
    enable_nixl: bool = False
    nixl_extra_config: dict[str, Any] | None = None
    enable_remote: bool = False         # follows from the two backends below
    enable_kv_sharing: bool = False     # follows from the three enable_ below
    enable_p2p_cpu: bool = False
    enable_p2p_ssd: bool = False
    enable_3rd_remote: bool = False

    distributed_node_id: int = -1
    num_tmp_cpu_blocks: int = 500
    use_hugepage_cpu_buffer: bool = False
    use_hugepage_tmp_buffer: bool = False
    hugepage_size_bytes: int = 2 * 1024 * 1024

    num_cpu_blocks: int = 1000000
    num_ssd_blocks: int = 10000000
    num_remote_blocks: int | None = None
    num_local_blocks: int = 1000000

    ssd_cache_dir: str | list[str] | None = None

    remote_cache_size_mode: str = "file_size"
    remote_file_size: int | None = None
    remote_file_num: int | None = None
    remote_file_prefix: str | None = None
    remote_cache_path: str | list[str] | None = None
    remote_config_custom: dict[str, Any] | None = None

    local_zmq_ip: str = "127.0.0.1"
    local_zmq_port: int = 5555
    redis_host: str = "127.0.0.1"
    redis_port: int = 6379
    local_ip: str = "127.0.0.1"
    redis_password: str | None = field(default=None, repr=False)
    node_ttl_seconds: int = 30

    mooncake_config_path: str | None = None
    use_mooncake_store_backend: bool = False
    mooncake_store_config_path: str | None = None
    mooncake_store_pp_rank: int = 0
    mooncake_store_pp_size: int = 1
    mooncake_store_node_layer_start: int = 0
    mooncake_store_node_layer_end: int = 0
    mooncake_store_total_layers: int = 0

    # The sizes that the counts of blocks were made from; 0: the counts were given.
    _user_cpu_cache_gb: float = 0
    _user_ssd_cache_gb: float = 0

    swa: SWAPoolConfig | None = None
    enable_swa_transfer: bool = False

    def __post_init__(self) -> None:
        self.use_mooncake_store_backend = self.use_mooncake_store_backend or parse_bool(
            os.environ.get("FLEXKV_USE_MOONCAKE_STORE_BACKEND", "0"))
        if self.use_mooncake_store_backend and self.mooncake_store_config_path is None:
            self.mooncake_store_config_path = os.environ.get("FLEXKV_MOONCAKE_STORE_CONFIG_PATH")
            if self.mooncake_store_config_path is None:
                raise ValueError("use_mooncake_store_backend needs mooncake_store_config_path "
                                 "(FLEXKV_MOONCAKE_STORE_CONFIG_PATH), which is not set")
        self.derive_flags()

    def derive_flags(self) -> None:
        """After a change to one of the enable_ fields that others follow from."""
        self.enable_kv_sharing = (self.enable_p2p_cpu or self.enable_p2p_ssd
                                  or self.enable_3rd_remote)
        self.enable_remote = self.enable_3rd_remote or self.use_mooncake_store_backend

    def __str__(self) -> str:
        return (f"CacheConfig(tokens_per_block={self.tokens_per_block}, "
                f"num_cpu_blocks={self.num_cpu_blocks}, enable_ssd={self.enable_ssd}, "
                f"num_ssd_blocks={self.num_ssd_blocks}, "
                f"enable_kv_sharing={self.enable_kv_sharing}, "
                f"enable_remote={self.enable_remote})")


def convert_to_block_num(size_in_GB: float, block_size_in_bytes: int) -> int:
    return int(size_in_GB * (1 << 30) / block_size_in_bytes)


def block_size_in_bytes_for_cache(model_config: ModelConfig, cache_config: CacheConfig,
                                  rank_info: RankInfo | None = None) -> int:
    """Bytes of a block: of all groups where there are layer_groups, else of the rank's stage."""
    tokens = cache_config.tokens_per_block
    if model_config.layer_groups is None:
        if rank_info is None:
            raise ValueError("rank_info is needed where the model has no layer_groups")
        return rank_info.token_size_in_bytes_per_pp_stage * tokens
    total = 0
    for i, group in enumerate(model_config.layer_groups):
        if tokens % group.compress_ratio:
            raise ValueError(f"layer_groups[{i}].compress_ratio {group.compress_ratio} does not "
                             f"divide tokens_per_block {tokens}")
        total += (group.num_layers * model_config.kv_dim * (tokens // group.compress_ratio)
                  * group.num_kv_heads * group.head_size
                  * dtype_bytes(group.dtype or model_config.dtype))
    return total * model_config.tp_size


def _count_blocks(cache_config: CacheConfig, block_bytes: int) -> tuple[int, int]:
    """Blocks of the CPU and the SSD tier; the latter divide evenly among the directories."""
    cpu = convert_to_block_num(cache_config._user_cpu_cache_gb, block_bytes)
    ssd = convert_to_block_num(cache_config._user_ssd_cache_gb, block_bytes)
    n_dirs = len(parse_path_list(cache_config.ssd_cache_dir or "")) or 1
    return cpu, -(-ssd // n_dirs) * n_dirs


def recompute_cache_block_counts(model_config: ModelConfig, cache_config: CacheConfig) -> bool:
    """Once the layer_groups are known: the counts of blocks that the given sizes amount to now.
    True: they have changed."""
    if model_config.layer_groups is None:
        return False
    old = cache_config.num_cpu_blocks, cache_config.num_ssd_blocks
    cpu, ssd = _count_blocks(cache_config,
                             block_size_in_bytes_for_cache(model_config, cache_config))
    if cache_config._user_cpu_cache_gb > 0:
        cache_config.num_cpu_blocks = cpu
    if cache_config._user_ssd_cache_gb > 0:
        cache_config.num_ssd_blocks = ssd
    return old != (cache_config.num_cpu_blocks, cache_config.num_ssd_blocks)


_COPIED_FLAGS = (
    "enable_gds", "enable_nixl", "use_hugepage_cpu_buffer", "use_hugepage_tmp_buffer",
    "hugepage_size_bytes", "enable_p2p_cpu", "enable_p2p_ssd", "enable_3rd_remote",
    "use_mooncake_store_backend", "mooncake_store_config_path",
)
_COPIED_IF_GIVEN = (
    "local_zmq_ip", "local_zmq_port", "redis_host", "redis_port", "local_ip", "redis_password",
    "node_ttl_seconds",
)


def update_default_config_from_user_config(rank_info: RankInfo | ModelConfig,
                                           cache_config: CacheConfig,
                                           user_config: UserConfig) -> None:
    """Writes what the user set into cache_config and GLOBAL_CONFIG_FROM_ENV."""
    if isinstance(rank_info, ModelConfig):
        rank_info = RankInfo(model_config=rank_info)
    if not cache_config.enable_cpu:
        raise ValueError("enable_cpu must be true: SSDs and other nodes are read through the "
                         "CPU tier")
    cache_config.ssd_cache_dir = user_config.ssd_cache_dir
    cache_config._user_cpu_cache_gb = user_config.cpu_cache_gb
    cache_config._user_ssd_cache_gb = user_config.ssd_cache_gb
    cache_config.enable_ssd = user_config.ssd_cache_gb > 0
    cache_config.num_cpu_blocks, cache_config.num_ssd_blocks = _count_blocks(
        cache_config,
        block_size_in_bytes_for_cache(rank_info.model_config, cache_config, rank_info))
    for name in _COPIED_FLAGS:
        setattr(cache_config, name, getattr(user_config, name))
    for name in _COPIED_IF_GIVEN:
        if getattr(user_config, name) is not None:
            setattr(cache_config, name, getattr(user_config, name))
    cache_config.derive_flags()
    _apply_overrides(cache_config, user_config.overrides())


def _apply_overrides(cache_config: CacheConfig, overrides: dict[str, Any]) -> None:
    """The rest of a file's keys. Those for the node alone are left to it: it reads the file."""
    for name, value in overrides.items():
        if hasattr(GLOBAL_CONFIG_FROM_ENV, name):
            setattr(GLOBAL_CONFIG_FROM_ENV, name, convert_override(name, value))
    for count, size in (("num_cpu_blocks", "_user_cpu_cache_gb"),
                        ("num_ssd_blocks", "_user_ssd_cache_gb")):
        if count in overrides:
            setattr(cache_config, count, int(overrides[count]))
            setattr(cache_config, size, 0)
    if "num_ssd_blocks" in overrides or "enable_ssd" in overrides:
        cache_config.enable_ssd = (cache_config.num_ssd_blocks > 0
                                   and parse_bool(overrides.get("enable_ssd", True)))
    if "eviction_policy" in overrides:
        cache_config.eviction_policy = str(overrides["eviction_policy"])
