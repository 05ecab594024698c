"""The options that concern the connector, read once, and the address where the engine's processes
meet. Names, defaults and their sources (file, environment) are the library's own."""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from flexkv._flexkv import Config

_DEFAULT_ADDRESS = "ipc:///tmp/flexkv_server"


@dataclass(frozen=True)
class Settings:
    enabled: bool
    sync_get: bool
    layerwise: bool
    client: bool                # a daemon serves the node; else this engine opens its own
    launch: bool                # start the daemon if there is none
    address: str
    max_spaces: int
    op_timeout: float           # seconds
    lease_timeout: float
    start_timeout: float        # for workers, and for a daemon to come up
    events: bool = False        # KV events for routers


def read(vllm_config: Any) -> Settings:
    config = Config()
    config.load_default()

    def number(key: str) -> int:
        return int(config.get(key) or 0)

    client = shared(config) or _is_replica(vllm_config)
    address = config.get("server_recv_port")
    if not client and not address_given(address):
        address = own_address(str(vllm_config.kv_transfer_config.engine_id))
    return Settings(
        enabled=true(config.get("enable_flexkv")),
        sync_get=true(config.get("sync_get")),
        layerwise=_layerwise(vllm_config, config),
        client=client,
        launch=config.get("server_launch_mode") != "external",
        address=address,
        max_spaces=number("max_spaces"),
        events=true(config.get("enable_kv_events")) or true(config.get("dynamo_use_flexkv")),
        op_timeout=number("op_timeout_ms") / 1e3,
        lease_timeout=number("lease_timeout_ms") / 1e3,
        start_timeout=number("worker_timeout_ms") / 1e3,
    )


def _layerwise(vllm_config: Any, config: Config) -> bool:
    """Also to be had for one engine only."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    value = extra.get("enable_layerwise_transfer")
    return true(str(value) if value is not None else config.get("enable_layerwise_transfer"))


def _is_replica(vllm_config: Any) -> bool:
    """One of several data-parallel engines? Replicas of a dense model are told that they are alone;
    the suffix of their engine's id gives them away."""
    parallel = vllm_config.parallel_config
    return (parallel.data_parallel_size > 1 or getattr(parallel, "data_parallel_index", 0) > 0
            or re.search(r"_dp\d+$", str(vllm_config.kv_transfer_config.engine_id)) is not None)


def own_address(engine_id: str) -> str:
    """A socket in the abstract namespace, which leaves nothing behind. Both sides know the id."""
    return f"ipc://@flexkv-{os.getuid()}-" + re.sub(r"[^A-Za-z0-9_.-]", "_", engine_id)[:64]


def shared(config: Config) -> bool:
    """Do the options ask for a node that several engines share?"""
    return true(config.get("server_client_mode")) or int(config.get("instance_num") or 0) > 1


def address_given(address: str) -> bool:
    """Did the user choose the address?"""
    return address != _DEFAULT_ADDRESS or "FLEXKV_SERVER_RECV_PORT" in os.environ


def true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "on", "yes")
