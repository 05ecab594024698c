"""What a user sets: FLEXKV_* variables, or the file that FLEXKV_CONFIG_PATH names.

File before environment before default: with a file, the basic options below are not read from the
environment. Keys that are not basic options are overrides, for GLOBAL_CONFIG_FROM_ENV or for the
node, which reads the same file and names the nearest option for a key that nobody knows.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from flexkv.common.env import env_value, parse_bool, parse_gib

OVERRIDE = "override_"
_SECTIONS = ("cache_config", "model_config")     # of the legacy form


@dataclass
class UserConfig:
    cpu_cache_gb: int | float = 16
    ssd_cache_gb: int | float = 0                # 0: no SSD tier
    ssd_cache_dir: str | list[str] = "./ssd_cache"
    enable_gds: bool = False
    enable_nixl: bool = False
    use_hugepage_cpu_buffer: bool = False
    use_hugepage_tmp_buffer: bool = False
    hugepage_size_bytes: int = 2 * 1024 * 1024
    enable_p2p_cpu: bool = False
    enable_p2p_ssd: bool = False
    enable_3rd_remote: bool = False
    use_mooncake_store_backend: bool = False
    mooncake_store_config_path: str | None = None
    mooncake_store_pp_rank: int = 0
    mooncake_store_pp_size: int = 1
    mooncake_store_node_layer_start: int = 0
    mooncake_store_node_layer_end: int = 0
    mooncake_store_total_layers: int = 0
    local_zmq_ip: str | None = None
    local_zmq_port: int | None = None
    redis_host: str | None = None
    redis_port: int | None = None
    local_ip: str | None = None
    redis_password: str | None = field(default=None, repr=False)
    node_ttl_seconds: int | None = None
    kv_cache_dtype: str | None = None            # where the engine only says "auto"
    swa_multi_group: bool | None = None

    def __post_init__(self) -> None:
        self.cpu_cache_gb = parse_gib(self.cpu_cache_gb)
        self.ssd_cache_gb = parse_gib(self.ssd_cache_gb)
        if self.cpu_cache_gb <= 0:
            raise ValueError(f"cpu_cache_gb must be more than 0, not {self.cpu_cache_gb}")
        if self.ssd_cache_gb < 0:
            raise ValueError(f"ssd_cache_gb must be 0 (no SSD tier) or more, "
                             f"not {self.ssd_cache_gb}")
        if self.swa_multi_group not in (None, True, False):
            raise ValueError("swa_multi_group must be a boolean or absent, "
                             f"not {self.swa_multi_group!r}")

    def overrides(self) -> dict[str, Any]:
        return {name.removeprefix(OVERRIDE): value for name, value in vars(self).items()
                if name.startswith(OVERRIDE)}


def parse_path_list(paths: str | list[str]) -> list[str]:
    """"/mnt/a;/mnt/b" as a list; a list is taken as it is."""
    parts = paths.split(";") if isinstance(paths, str) else paths
    return [part.strip() for part in parts if part.strip()]


def _read_file(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        if path.endswith(".json"):
            content = json.load(file)
        elif path.endswith((".yaml", ".yml")):
            try:
                import yaml
            except ImportError:
                raise ImportError(f"reading {path} needs the package PyYAML; install it, or "
                                  "write the configuration as JSON (.json)") from None
            content = yaml.safe_load(file)
        else:
            raise ValueError(f"{path}: the name of a configuration file must end in .json, "
                             ".yaml or .yml")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a configuration file holds keys and values, "
                         f"not a {type(content).__name__}")
    return content


def _flatten(content: dict[str, Any]) -> dict[str, Any]:
    """The legacy form has sections; any key may stand in one. null means not given."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in _SECTIONS and isinstance(value, dict):
            flat.update(value)
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if value is not None}


def load_user_config_from_file(config_file: str) -> UserConfig:
    content = _flatten(_read_file(str(config_file)))
    if "ssd_cache_dir" in content:
        content["ssd_cache_dir"] = parse_path_list(content["ssd_cache_dir"])
    basic = {f.name for f in fields(UserConfig)}
    try:
        config = UserConfig(**{k: v for k, v in content.items() if k in basic})
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    for key, value in content.items():
        if key not in basic:
            setattr(config, OVERRIDE + key, value)
    return config


def load_user_config_from_env() -> UserConfig:
    def env(name: str, parse: Any, default: Any) -> Any:
        return env_value("FLEXKV_" + name.upper(), parse, default)

    return UserConfig(
        cpu_cache_gb=env("cpu_cache_gb", parse_gib, 16),
        ssd_cache_gb=env("ssd_cache_gb", parse_gib, 0),
        ssd_cache_dir=env("ssd_cache_dir", parse_path_list, ["./flexkv_ssd"]),
        enable_gds=env("enable_gds", parse_bool, False),
        enable_nixl=env("enable_nixl", parse_bool, False),
        use_hugepage_cpu_buffer=env("use_hugepage_cpu_buffer", parse_bool, False),
        use_hugepage_tmp_buffer=env("use_hugepage_tmp_buffer", parse_bool, False),
        hugepage_size_bytes=env("hugepage_size_bytes", int, 2 * 1024 * 1024),
        use_mooncake_store_backend=env("use_mooncake_store_backend", parse_bool, False),
        mooncake_store_config_path=env("mooncake_store_config_path", str, None),
        kv_cache_dtype=env("kv_cache_dtype", str, None),
        swa_multi_group=env("swa_multi_group", parse_bool, None),
    )
