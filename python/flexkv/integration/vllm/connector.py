"""FlexKV's own connector class for vLLM, with all that the interface offers:

    --kv-transfer-config '{"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both",
        "kv_connector_module_path": "flexkv.integration.vllm.connector",
        "kv_load_failure_policy": "recompute"}'

See docs/vllm.md. The engine's front end imports this module too, for metrics only.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from . import versions
from .protocol import StepMetadata, StepStats, step_of
from .side import sides


class FlexKVConnectorV1(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._num_blocks = kv_cache_config.num_blocks
        self._scheduler, self._worker = sides(vllm_config, role, kv_cache_config, full=True)
        self._transfer_results = versions.transfer_results()

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is computed again."""
        return False

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()

    # ---- worker --------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._worker is not None:
            self._worker.register(kv_caches, self._num_blocks)

    def _metadata(self) -> StepMetadata | None:
        metadata = self._connector_metadata
        return metadata if isinstance(metadata, StepMetadata) else None

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            self._worker.fence(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads are commanded by the scheduler's side; some come while the step computes."""
        if self._worker is not None:
            self._worker.begin_step(self._metadata(), forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any,
                      **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Engines that know get_transfer_results call that instead."""
        if self._worker is None:
            return None, None
        ended, _ = self._worker.finish_step(self._metadata())
        return None, ended or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        assert self._transfer_results is not None
        if self._worker is None:
            return self._transfer_results()
        ended, whole = self._worker.finish_step(self._metadata())
        return self._transfer_results(finished_recving=ended, failed_recving=whole)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def get_kv_connector_stats(self) -> StepStats | None:
        if self._worker is not None:
            return self._worker.stats(self._metadata())
        return self._scheduler.stats() if self._scheduler is not None else None

    # ---- scheduler -----------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Any,
                                   num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any,
                                 num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any,
                                       num_external_tokens: int) -> dict[Any, int]:
        """For engines that have this call; the import is there in those only."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
        if self._scheduler is None or not num_external_tokens:
            return {}
        cpu, ssd, peer = self._scheduler.hit_sources(request)
        if cpu + ssd + peer != num_external_tokens:
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: num_external_tokens}
        sources = {CacheHitSource.HOST: cpu, CacheHitSource.DISK: ssd, CacheHitSource.P2P: peer}
        return {source: tokens for source, tokens in sources.items() if tokens}

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        if self._scheduler is None:
            return StepMetadata()
        return self._scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.update(connector_output, *step_of(connector_output))

    def request_finished(self, request: Any,
                         block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]
                                    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request, block_ids), None

    def has_pending_push_work(self) -> bool:
        """Stores end, and give back what they hold, only as the engine goes on stepping."""
        return self._scheduler is not None and self._scheduler.pending

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events() if self._scheduler is not None else ()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else None

    # ---- front end -----------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> StepStats:
        return StepStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, metric_types: Any, labelnames: list[str],
                           per_engine_labelvalues: dict[int, list[object]]) -> Any:
        from .metrics import FlexKVPromMetrics
        return FlexKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
