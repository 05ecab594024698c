"""From the reference's configuration objects to the node's options (flexkv.conf(5)).

The node reads FLEXKV_CONFIG_PATH and the environment itself. Said here, and so stronger than both,
is only what the objects state: sizes, directories, and whatever differs from the environment.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexkv import Config
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.env import GLOBAL_CONFIG_FROM_ENV, load_global_config
from flexkv.common.user_config import parse_path_list

if TYPE_CHECKING:
    from types import SimpleNamespace

# Attributes of GLOBAL_CONFIG_FROM_ENV that are options of the node by the same name.
_NODE_OPTIONS = (
    "evict_ratio", "evict_start_threshold", "hit_reward_seconds", "eviction_policy",
    "slru_protected_threshold", "iouring_entries", "lease_ttl_ms", "renew_lease_ms",
    "safety_ttl_ms", "reset_barrier_timeout_ms", "enable_metrics", "enable_trace",
    "trace_file_path", "trace_max_file_size_mb", "trace_max_files", "trace_flush_interval_ms",
)
_CACHE_FLAGS = (
    "enable_gds", "enable_nixl", "use_hugepage_cpu_buffer", "use_hugepage_tmp_buffer",
    "enable_p2p_cpu", "enable_p2p_ssd", "enable_3rd_remote", "use_mooncake_store_backend",
)
_DISTRIBUTED = (
    "local_zmq_ip", "local_zmq_port", "redis_host", "redis_port", "local_ip", "redis_password",
    "node_ttl_seconds", "mooncake_config_path", "mooncake_store_config_path",
)

_from_env: SimpleNamespace = load_global_config()


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _tier(name: str, gib: float, blocks: int) -> dict[str, str]:
    """A tier's size: the one that the user gave, else the count of blocks."""
    if gib > 0:
        return {f"{name}_cache_gb": f"{gib:.12f}".rstrip("0").rstrip("."), f"num_{name}_blocks": "0"}
    return {f"num_{name}_blocks": str(blocks)}


def node_settings(model_config: ModelConfig, cache_config: CacheConfig) -> dict[str, str]:
    """The options to set, by their file keys."""
    settings = _tier("cpu", cache_config._user_cpu_cache_gb, cache_config.num_cpu_blocks)
    settings["enable_ssd"] = _text(cache_config.enable_ssd)
    if cache_config.enable_ssd:
        settings |= _tier("ssd", cache_config._user_ssd_cache_gb, cache_config.num_ssd_blocks)
        dirs = parse_path_list(cache_config.ssd_cache_dir or [])
        if dirs:
            settings["ssd_cache_dir"] = ";".join(dirs)
        if not model_config.model_id:
            # What lies there can't be used anyway: nobody knows whose KV it is.
            settings["ssd_recreate"] = "1"
    default = CacheConfig()
    for name in _CACHE_FLAGS:
        if getattr(cache_config, name):
            settings[name] = "1"
    if cache_config.hugepage_size_bytes != default.hugepage_size_bytes:
        settings["hugepage_size_bytes"] = _text(cache_config.hugepage_size_bytes)
    if cache_config.enable_kv_sharing or cache_config.enable_remote:
        for name in _DISTRIBUTED:
            if getattr(cache_config, name) != getattr(default, name):
                settings[name] = _text(getattr(cache_config, name))
    for name in _NODE_OPTIONS:
        value = getattr(GLOBAL_CONFIG_FROM_ENV, name)
        if value != getattr(_from_env, name):
            settings[name] = _text(value)
    if cache_config.eviction_policy != default.eviction_policy:
        settings["eviction_policy"] = cache_config.eviction_policy
    return settings


def node_config(settings: dict[str, str]) -> Config:
    config = Config()
    config.load_default()
    for key, value in settings.items():
        config.set(key, value)
    return config
