"""The environment as code written for the reference sees it: GLOBAL_CONFIG_FROM_ENV.

Read once, at import. The node reads the environment itself, with more options and checks (see
`flexkv config --help`); what is changed here afterwards, in code or by a file's overrides, is
handed to it by flexkv.common.node_config.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flexkv.common.storage import KVCacheLayoutType

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def parse_bool(text: Any) -> bool:
    word = str(text).strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither yes (1, true, yes, on) nor no (0, false, no, off)")


def parse_gib(text: Any) -> int | float:
    """GiB: a bare number counts them, one with a suffix (512M, 1.5T, 4096B) does not."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return text
    word = str(text).strip().upper().removesuffix("IB")
    factors = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10, "P": 2.0**20}
    number, factor = word, 1.0
    if len(word) > 1 and word[-1] == "B":
        number, factor = word[:-1], 2.0**-30
        if number[-1] in factors:
            number, factor = number[:-1], factors[number[-1]]
    elif word and word[-1] in factors:
        number, factor = word[:-1], factors[word[-1]]
    try:
        size = float(number) * factor
    except ValueError:
        raise ValueError(f"{text!r} is no size; examples: 16, 0.5, 512M, 1.5T") from None
    return int(size) if size == int(size) else size


def _layout(text: str) -> KVCacheLayoutType:
    return KVCacheLayoutType(text.upper())


def _lower(text: str) -> str:
    return text.strip().lower()


_Parser = Callable[[str], Any]

# attribute: (parser, default); the variable is FLEXKV_ and the name in upper case.
_ATTRIBUTES: dict[str, tuple[_Parser, Any]] = {
    "instance_num": (int, 1),
    "instance_id": (int, 0),
    "enable_metrics": (parse_bool, False),
    "cpp_metrics_port": (int, 8081),
    "py_metrics_port": (int, 8080),
    "use_mooncake_store_backend": (parse_bool, False),
    "mooncake_store_config_path": (str, None),
    "server_client_mode": (parse_bool, False),
    "server_launch_mode": (_lower, "embedded"),
    "server_recv_port": (str, "ipc:///tmp/flexkv_server"),
    "index_accel": (parse_bool, True),
    "cpu_layout_type": (_layout, KVCacheLayoutType.BLOCKFIRST),
    "ssd_layout_type": (_layout, KVCacheLayoutType.BLOCKFIRST),
    "remote_layout_type": (_layout, KVCacheLayoutType.BLOCKFIRST),
    "gds_layout_type": (_layout, KVCacheLayoutType.BLOCKFIRST),
    "enable_layerwise_transfer": (parse_bool, False),
    "layerwise_notify_mode": (str, "hostfunc"),
    "use_ce_transfer_h2d": (parse_bool, False),
    "use_ce_transfer_d2h": (parse_bool, False),
    "transfer_num_cta_h2d": (int, 4),
    "transfer_num_cta_d2h": (int, 4),
    "ce_segment_threshold": (int, 8),
    "ce_path_opt": (parse_bool, True),
    "ssd_io_opt": (parse_bool, True),
    "enable_ce_memcpy2d": (parse_bool, True),
    "ce_gather_threads": (int, 4),
    "ce_gather_nt": (parse_bool, True),
    "iouring_entries": (int, 512),
    "iouring_flags": (int, 0),
    "max_file_size_gb": (float, -1.0),
    "evict_ratio": (float, 0.0),
    "evict_start_threshold": (float, 1.0),
    "hit_reward_seconds": (int, 0),
    "eviction_policy": (_lower, "lru"),
    "slru_protected_threshold": (int, 2),
    "enable_mps": (parse_bool, True),
    "enable_collective_sync": (parse_bool, True),
    "enable_trace": (parse_bool, False),
    "trace_file_path": (str, "./flexkv_trace.log"),
    "trace_max_file_size_mb": (int, 100),
    "trace_max_files": (int, 5),
    "trace_flush_interval_ms": (int, 1000),
    "enable_transfer_trace": (parse_bool, False),
    "lt_pool_initial_capacity": (int, 10000000),
    "refresh_batch_size": (int, 256),
    "rebuild_interval_ms": (int, 2000),
    "idle_sleep_ms": (int, 10),
    "lease_ttl_ms": (int, 30000),
    "safety_ttl_ms": (int, 100),
    "renew_lease_ms": (int, 4000),
    "reset_barrier_timeout_ms": (int, 60000),
    "reset_barrier_poll_ms": (int, 50),
    "nvcomp_batch_size": (int, 0),
    "kv_shared_across_ranks_mode": (str, "sharded"),
    "worker_shutdown_timeout_s": (float, 600.0),
    "transfer_manager_shutdown_timeout_s": (float, 900.0),
}

# Variables that are not named after their attribute.
_VARIABLES = {
    "cpu_layout_type": "FLEXKV_CPU_LAYOUT",
    "ssd_layout_type": "FLEXKV_SSD_LAYOUT",
    "remote_layout_type": "FLEXKV_REMOTE_LAYOUT",
    "gds_layout_type": "FLEXKV_GDS_LAYOUT",
    "enable_transfer_trace": "FLEXKV_TRANSFER_TRACE",
}


def env_value(variable: str, parse: _Parser, default: Any) -> Any:
    """The parsed variable; the default where it is not set; an error that names it."""
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text}: {error}") from None


def load_global_config() -> SimpleNamespace:
    config = SimpleNamespace()
    for name, (parse, default) in _ATTRIBUTES.items():
        variable = _VARIABLES.get(name, "FLEXKV_" + name.upper())
        setattr(config, name, env_value(variable, parse, default))
    return config


def convert_override(name: str, value: Any) -> Any:
    """A file's value in the type of the attribute; KeyError: no such attribute."""
    parse, _ = _ATTRIBUTES[name]
    try:
        return parse(str(value)) if isinstance(value, (str, bool, int, float)) else value
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


GLOBAL_CONFIG_FROM_ENV = load_global_config()
