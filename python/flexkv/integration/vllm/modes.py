"""How loads fit into the engine's steps: between them, in them, or layer by layer within them."""
from __future__ import annotations

import logging
from typing import Any

from . import versions
from .requests import Space
from .settings import Settings

logger = logging.getLogger("vllm.flexkv")

_SYNC, _LAYERWISE = "FLEXKV_SYNC_GET", "FLEXKV_ENABLE_LAYERWISE_TRANSFER"


def load_modes(settings: Settings, vllm_config: Any, spaces: list[Space], *,
               full: bool) -> tuple[bool, bool]:
    """(synchronous, layerwise): the step waits for its loads; each of its layers for its part."""
    wanted = [name for name, on in ((_SYNC, settings.sync_get), (_LAYERWISE, settings.layerwise))
              if on]
    reason = _why_not_in_steps(vllm_config, spaces)
    if wanted and reason:
        logger.warning("FlexKV: %s: no effect %s, loads are asynchronous", " and ".join(wanted),
                       reason)
    if reason or not wanted:
        return False, False
    reason = _why_not_layerwise(vllm_config, full) if settings.layerwise else ""
    if reason:
        logger.warning("FlexKV: %s: no effect %s, all layers are loaded at once", _LAYERWISE,
                       reason)
    layerwise = settings.layerwise and not reason
    return settings.sync_get or layerwise, layerwise


def _why_not_in_steps(vllm_config: Any, spaces: list[Space]) -> str:
    """A load in a step that fails is told by block numbers, which are ambiguous with several
    groups; a step scheduled after it would go on from what was not loaded; and workers that can't
    go back would compute the blocks at the wrong place."""
    if len(spaces) > 1 or spaces[0].group.partial:
        return "with this model's KV cache groups"
    if versions.overlapping(vllm_config):
        return ("when steps overlap (asynchronous scheduling, see --no-async-scheduling, or "
                "pipeline parallelism)")
    recompute = vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"
    if recompute and not versions.rewinds_running(vllm_config):
        return ("with vLLM's second model runner and kv_load_failure_policy \"recompute\" "
                "(VLLM_USE_V2_MODEL_RUNNER=0 chooses the first one)")
    return ""


def _why_not_layerwise(vllm_config: Any, full: bool) -> str:
    if not full:
        return "with the connector that comes with vLLM"
    if getattr(vllm_config, "speculative_config", None) is not None:
        return "with speculative decoding, whose layers are computed after the step's end"
    return ""
