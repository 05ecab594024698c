"""Where an engine and a layer-by-layer loader would meet. This build loads all layers at once, so
nobody listens there: leave FLEXKV_ENABLE_LAYERWISE_TRANSFER unset."""
from __future__ import annotations

import os

from flexkv.common.model import ModelConfig

_DEFAULT = "/tmp/flexkv_layerwise_eventfd.sock"


def build_layerwise_eventfd_socket_path(dp_client_id: int, pp_rank: int,
                                        model_config: ModelConfig) -> str:
    """One socket per pipeline stage and replica, named after FLEXKV_LAYERWISE_EVENTFD_SOCKET."""
    root, extension = os.path.splitext(
        os.environ.get("FLEXKV_LAYERWISE_EVENTFD_SOCKET", _DEFAULT))
    stage = f"_pp{pp_rank}" if model_config.pp_size > 1 else ""
    replica = f"_dp{dp_client_id}" if model_config.total_clients > 1 else ""
    return f"{root}{stage}{replica}{extension}"
