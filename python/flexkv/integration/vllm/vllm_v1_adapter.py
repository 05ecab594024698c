"""What the connector that comes with vLLM, FlexKVConnectorV1, loads and forwards its calls to.

It forwards 15 methods. Two more, which the engine calls in vain else, are put on its object: that
the cache is reset, and the engine's pool, which shows that it was cleared. What then is not there
(preemptions, several KV groups, statistics) works with our own connector class: see connector.py
and docs/vllm.md.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from . import versions
from .protocol import StepMetadata, StepStats, step_of
from .side import sides


class FlexKVConnectorV1Impl:
    def __init__(self, vllm_config: Any, role: Any) -> None:
        self._config = vllm_config
        self._scheduler, self._worker = sides(vllm_config, role, None, full=False)
        self._wrapper: Any = None
        if self._scheduler is not None:
            self._put_on(sys._getframe(1).f_locals.get("self"))

    def _put_on(self, connector: Any) -> None:
        """connector: whose constructor this is called by. A version that forwards these calls itself
        is left as it is."""
        base = versions.connector_base()
        if not isinstance(connector, base):
            return
        for name in ("reset_cache", "bind_gpu_block_pool"):
            if getattr(type(connector), name, None) is getattr(base, name, None) is not None:
                setattr(connector, name, getattr(self, name))

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()

    # ---- worker --------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._worker is not None:
            self._worker.register(kv_caches, self._num_blocks())

    def _num_blocks(self) -> int:
        config = getattr(self._find_wrapper(), "_kv_cache_config", None)
        blocks = getattr(config, "num_blocks", None) or self._config.cache_config.num_gpu_blocks
        if not blocks:
            raise RuntimeError("FlexKV: vLLM does not say how many KV blocks it has; use "
                               "kv_connector_module_path=flexkv.integration.vllm.connector")
        return int(blocks)

    def _metadata(self) -> StepMetadata | None:
        """The step's metadata, which is given to the wrapper."""
        wrapper = self._find_wrapper()
        if wrapper is None or not wrapper.has_connector_metadata():
            return None
        metadata = wrapper._get_connector_metadata()
        return metadata if isinstance(metadata, StepMetadata) else None

    def _find_wrapper(self) -> Any:
        """The connector object of vLLM's that holds this one: the engine's, or one inside of its
        MultiConnector."""
        if self._wrapper is None:
            from vllm.distributed import kv_transfer
            if kv_transfer.has_kv_transfer_group():
                candidates = [kv_transfer.get_kv_transfer_group()]
                while candidates and self._wrapper is None:
                    connector = candidates.pop()
                    if getattr(connector, "_flexkv_connector", None) is self:
                        self._wrapper = connector
                    candidates += getattr(connector, "_connectors", ())
        return self._wrapper

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads are commanded by the scheduler's side."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any,
                      **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        ended, _ = self._worker.finish_step(self._metadata())
        return None, ended or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def get_kv_connector_stats(self) -> StepStats | None:
        return self._worker.stats(self._metadata()) if self._worker is not None else None

    # ---- scheduler -----------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any,
                                   num_computed_tokens: int) -> tuple[int, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any,
                                 num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        if self._scheduler is None:
            return StepMetadata()
        return self._scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.update(connector_output, *step_of(connector_output))

    def request_finished(self, request: Any,
                         block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request, (block_ids,)), None

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events() if self._scheduler is not None else ()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else None

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_pool(gpu_block_pool)
