"""Where an engine and a layer-by-layer loader meet: SGLang's connector hands its eventfds, one for each
layer and counter, to the agent of the same process (Agent.serve_layers).

The connector asks for the socket by replica and stage alone, but each of its ranks has an agent of its
own; so a process that has one gets the name of its own agent's socket.
"""
from __future__ import annotations

import os

from flexkv import Config
from flexkv.common.model import ModelConfig

_DEFAULT = "/tmp/flexkv_layerwise_eventfd.sock"

_served: dict[tuple[int, int], str] = {}        # (replica, stage): where this process's agent listens


def _root() -> str:
    config = Config()
    config.load_default()
    return config.get("layerwise_eventfd_socket") or _DEFAULT


def build_layerwise_eventfd_socket_path(dp_client_id: int, pp_rank: int,
                                        model_config: ModelConfig) -> str:
    """One socket per pipeline stage and replica, named after FLEXKV_LAYERWISE_EVENTFD_SOCKET; and
    per rank, where there is an agent in this process."""
    served = _served.get((dp_client_id, pp_rank))
    if served is not None:
        return served
    root, extension = os.path.splitext(_root())
    stage = f"_pp{pp_rank}" if model_config.pp_size > 1 else ""
    replica = f"_dp{dp_client_id}" if model_config.total_clients > 1 else ""
    return f"{root}{stage}{replica}{extension}"


def worker_socket_path(dp_client_id: int, pp_rank: int, worker: int) -> str:
    """The socket of this process's agent, from now on; no other worker's, on this machine."""
    root, extension = os.path.splitext(_root())
    path = f"{root}_{os.getpid()}_dp{dp_client_id}_{worker}{extension}"
    _served[dp_client_id, pp_rank] = path
    return path


def forget_socket_path(dp_client_id: int, pp_rank: int) -> None:
    _served.pop((dp_client_id, pp_rank), None)
