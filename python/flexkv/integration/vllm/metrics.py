"""The connector's statistics as Prometheus metrics of the engine."""
from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from .protocol import GAUGES

METRICS = {
    "query_tokens": "Prompt tokens looked up in FlexKV",
    "hit_cpu_tokens": "Tokens loaded that were in FlexKV's cpu tier",
    "hit_ssd_tokens": "Tokens loaded that were in FlexKV's SSD tier",
    "hit_peer_tokens": "Tokens loaded that only other FlexKV nodes or a shared store had",
    "loads": "Loads that brought all their blocks",
    "early_loads": "Loads that were reported while their last copies were under way",
    "failed_loads": "Loads that did not; their blocks were computed",
    "loaded_blocks": "Blocks loaded",
    "stored_blocks": "Blocks stored, or found to be stored already",
    "dropped_blocks": "Blocks that were to be stored and were not",
    "errors": "Operations of FlexKV that failed",
    "cpu_blocks": "Room in FlexKV's cpu tier",
    "cpu_used_blocks": "Blocks in FlexKV's cpu tier",
    "ssd_blocks": "Room in FlexKV's SSD tier",
    "ssd_used_blocks": "Blocks in FlexKV's SSD tier",
}


class FlexKVPromMetrics(KVConnectorPromMetrics):
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str],
                 per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, dict[int, Any]] = {}
        for name, text in METRICS.items():
            gauge = name in GAUGES
            family = metric_types[Gauge if gauge else Counter](
                name="vllm:flexkv_" + name, documentation=text, labelnames=labelnames)
            self._metrics[name] = {engine: family.labels(*values)
                                   for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            metric = self._metrics.get(name, {}).get(engine_idx)
            if metric is None:
                continue
            if name in GAUGES:
                metric.set(value)
            else:
                metric.inc(value)
