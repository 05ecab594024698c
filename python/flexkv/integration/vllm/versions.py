"""Which versions of vLLM this package serves, in one place, and what it needs to find in them.

The connector interface changes between versions. What counts is what is there: a version that
was not tested runs if the interface has all that is used here and asks for nothing unknown.
"""
from __future__ import annotations

import importlib
import inspect
import logging
import os
from typing import Any

logger = logging.getLogger("vllm.flexkv")

TESTED = {
    "0.32.0": "on CPUs",
    "0.31.0": "on CPUs, in NVIDIA Dynamo",
    "0.24.0": "read, and run on GPUs by tests/device/vllm_engine.py",
}
ANY_VERSION = "FLEXKV_VLLM_ANY_VERSION"

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"

# Methods of vLLM's base class that must be overridden; we know what each is to do.
_KNOWN_ABSTRACT = {
    "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save",
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
}
# Calls that we rely on being made.
_HOOKS = {
    "bind_connector_metadata", "clear_connector_metadata", "_get_connector_metadata",
    "register_kv_caches", "get_finished", "get_block_ids_with_load_errors",
    "get_kv_connector_stats", "update_connector_output", "request_finished", "take_events",
}
_HOOKS_OF_OURS = _HOOKS | {
    "handle_preemptions", "bind_gpu_block_pool", "on_new_request", "has_pending_push_work",
    "reset_cache", "build_kv_connector_stats", "build_prom_metrics",
}


def vllm_version() -> str:
    return str(importlib.import_module("vllm").__version__)


def check(full: bool) -> None:
    """Raises RuntimeError if this vLLM's connector interface is not one we know. full: for our
    own connector class, which uses more of it than the one that comes with vLLM."""
    version = vllm_version()
    problems = _problems(_HOOKS_OF_OURS if full else _HOOKS)
    if not problems:
        if _plain(version) not in TESTED:
            logger.info("FlexKV: vLLM %s is not among the tested versions (%s); its connector "
                        "interface is the known one", version, _tested())
        return
    text = (f"FlexKV does not know the KV connector interface of vLLM {version}: "
            f"{'; '.join(problems)}. Tested versions: {_tested()}. Install one of them, "
            f"or set {ANY_VERSION}=1 to try this one nevertheless")
    if os.environ.get(ANY_VERSION, "0") not in ("", "0"):
        logger.warning("%s (%s is set: going on)", text, ANY_VERSION)
        return
    raise RuntimeError(text)


def _problems(hooks: set[str]) -> list[str]:
    try:
        base = importlib.import_module(_BASE).KVConnectorBase_V1
    except (ImportError, AttributeError) as e:
        return [f"no {_BASE}.KVConnectorBase_V1 ({e})"]
    problems = []
    unknown = sorted(set(base.__abstractmethods__) - _KNOWN_ABSTRACT)
    if unknown:
        problems.append("it demands methods that are unknown here: " + ", ".join(unknown))
    missing = sorted(name for name in hooks | _KNOWN_ABSTRACT if not hasattr(base, name))
    if missing:
        problems.append("it lacks " + ", ".join(missing))
    parameters = list(inspect.signature(base.__init__).parameters)
    if parameters[:4] != ["self", "vllm_config", "role", "kv_cache_config"]:
        problems.append("its constructor takes " + ", ".join(parameters[1:]))
    return problems


def _tested() -> str:
    return ", ".join(f"{version} ({how})" for version, how in TESTED.items())


def _plain(version: str) -> str:
    """0.32.0 of 0.32.0+cpu or 0.32.0.dev1."""
    return ".".join(version.split("+")[0].split(".")[:3])


def connector_base() -> type:
    return importlib.import_module(_BASE).KVConnectorBase_V1


_EVENTS = "vllm.distributed.kv_events"


class EventMaker:
    """The engine's own KV events of what Events.take gives. Their fields differ between versions."""

    def __init__(self, stored: Any = None, removed: Any = None) -> None:
        """ImportError where there is no vLLM and no classes are given."""
        if stored is None:
            module = importlib.import_module(_EVENTS)
            stored, removed = module.BlockStored, module.BlockRemoved
        self.stored, self.removed = stored, removed
        fields = set(getattr(stored, "__struct_fields__", None) or stored._fields)
        self._salts, self._loras = "extra_keys" in fields, "lora_name" in fields
        self._none = {name: None for name in ("lora_id", "lora_name", "extra_keys") if name in fields}

    def fits(self, label: Any) -> bool:
        """Can an event say it? What a router can't tell apart must not be announced."""
        return ((label.cache_salt is None or self._salts)
                and (label.lora_name is None or self._loras))

    def event(self, taken: tuple[Any, ...]) -> Any:
        stored, medium, hashes, parent, tokens, size, lora, salt = taken
        if not stored:
            return self.removed(block_hashes=hashes, medium=medium)
        more = dict(self._none)
        if lora is not None:
            more["lora_name"] = lora
        if salt is not None and parent is None:
            # Of the prompt's first block only, as the engine's own events have it: the others
            # have it from their parents.
            more["extra_keys"] = [(salt,)] + [None] * (len(hashes) - 1)
        return self.stored(block_hashes=hashes, parent_block_hash=parent, token_ids=tokens,
                            block_size=size, medium=medium, **more)


def events_by_digest() -> bool:
    """Do the engine's events have whole digests, where ours have their last 64 bits?"""
    envs = importlib.import_module("vllm.envs")
    return not getattr(envs, "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", True)


def transfer_results() -> type | None:
    """The class in which workers report a failed load by its request; None where only block
    numbers can be reported, which are ambiguous with several KV groups."""
    return getattr(importlib.import_module(_BASE), "KVConnectorTransferResults", None)


def frees_by_processed_tokens() -> bool:
    """Does the scheduler free what left a sliding window only once the step that computed it has
    come back? Older versions count steps that are still under way."""
    source = importlib.import_module("vllm.v1.request").Request.__init__.__code__
    return "num_in_flight_tokens" in source.co_names


def overlapping(vllm_config: Any) -> bool:
    """Are steps scheduled before the ones before them have come back?"""
    return getattr(vllm_config, "max_concurrent_batches", 1) > 1


def defers_frees() -> bool:
    """Do blocks of a finished or preempted request stay taken until the steps under way, which may
    still write them, have come back? Else they can be given to a load meanwhile."""
    module = importlib.import_module("vllm.v1.core.sched.scheduler")
    return "defer_block_free" in module.Scheduler.__init__.__code__.co_names


def rewinds_running(vllm_config: Any) -> bool:
    """Do workers go back when the scheduler says that a running request has fewer tokens computed
    than they think? The second model runner counts for itself, on the GPU."""
    return not getattr(vllm_config, "use_v2_model_runner", False)


def calls_layer_hooks(forward_context: Any) -> bool:
    """Will the step call wait_for_layer_load? Not if it replays one CUDA graph of the whole model.
    The second model runner does that outside of its forward context: there is no attention
    metadata then."""
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    return (getattr(forward_context, "attn_metadata", None) is not None
            and getattr(mode, "name", "NONE") != "FULL")
