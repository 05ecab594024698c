"""KV events for routers, in the form that vLLM publishes them.

The node of this build makes no events, so nothing is collected by itself; what a caller publishes
here is handed out unchanged.
"""
from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class KVEventCollector:
    def __init__(self) -> None:
        self._events: list[Any] = []
        self._lock = threading.Lock()

    def _add(self, event: Any) -> None:
        with self._lock:
            self._events.append(event)

    def publish_stored(self, block_hashes: np.ndarray, block_size: int = 16,
                       lora_id: int | None = None, medium: str | None = "CPU") -> None:
        from vllm.distributed.kv_events import BlockStored
        self._add(BlockStored(block_hashes=block_hashes.tolist(), parent_block_hash=None,
                              token_ids=[], block_size=block_size, lora_id=lora_id, medium=medium,
                              lora_name=None))

    def publish_removed(self, block_hashes: np.ndarray, medium: str | None = "CPU") -> None:
        from vllm.distributed.kv_events import BlockRemoved
        self._add(BlockRemoved(block_hashes=block_hashes.tolist(), medium=medium))

    def take_events(self) -> list[Any]:
        """Each event once."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Nothing runs in the background."""
