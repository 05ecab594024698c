"""What both connectors do when they are made: see whether this vLLM and this model can be served,
and take the side that the role says."""
from __future__ import annotations

import logging
from typing import Any

from . import versions
from .groups import Unsupported, groups_of

logger = logging.getLogger("vllm.flexkv")


def sides(vllm_config: Any, role: Any, kv_cache_config: Any | None, *,
          full: bool) -> tuple[Any, Any]:
    """(scheduler's side, worker's side); one of them None, both where caching is off."""
    versions.check(full)
    from . import settings      # needs the extension module
    options = settings.read(vllm_config)
    scheduling = role.name == "SCHEDULER"
    reason = None if options.enabled else "ENABLE_FLEXKV is 0"
    if reason is None:
        reason = _unsupported(vllm_config, kv_cache_config)
    if reason is not None:
        if scheduling:
            logger.warning("FlexKV: caching is off: %s", reason)
        return None, None
    if scheduling:
        from .scheduler import SchedulerSide
        return SchedulerSide(vllm_config, kv_cache_config, options, full=full), None
    from .worker import WorkerSide
    return None, WorkerSide(vllm_config, kv_cache_config, options)


def _unsupported(vllm_config: Any, kv_cache_config: Any | None) -> str | None:
    try:
        groups = groups_of(vllm_config, kv_cache_config)
    except Unsupported as e:
        return str(e)
    if versions.transfer_results() is None and (len(groups) > 1 or groups[0].partial):
        return (f"the model has {len(groups)} KV cache groups or a sliding window, and vLLM "
                f"{versions.vllm_version()} has no way to report a load that failed as a whole")
    if (any(g.partial for g in groups) and versions.overlapping(vllm_config)
            and not versions.frees_by_processed_tokens()):
        return (f"vLLM {versions.vllm_version()} frees sliding-window blocks before the step that "
                "fills them has come back; --no-async-scheduling avoids that")
    return None
