"""KV events for routers, in the form that vLLM publishes them: of a KVManager that was given the
collector, and whatever a caller publishes here by itself.
"""
from __future__ import annotations

import threading
from collections import namedtuple
from typing import TYPE_CHECKING, Any

from flexkv._flexkv import Error
from flexkv.common.debug import flexkv_logger
from flexkv.integration.vllm.versions import EventMaker

if TYPE_CHECKING:
    import numpy as np

# The same fields, where there is no vLLM.
BlockStored = namedtuple("BlockStored", "block_hashes parent_block_hash token_ids block_size lora_id "
                         "medium lora_name extra_keys", defaults=(None, None, None, None))
BlockRemoved = namedtuple("BlockRemoved", "block_hashes medium", defaults=(None,))


class KVEventCollector:
    """take_events by one thread; the rest by any."""

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._lock = threading.Lock()
        self._source: Any = None
        try:
            self._make = EventMaker()
        except ImportError:
            self._make = EventMaker(BlockStored, BlockRemoved)

    def follow(self, node: Any, space: Any) -> None:
        """From now on what becomes of the space's blocks is collected, first what is there."""
        try:
            source = node.events(space)
        except Error as e:
            flexkv_logger.warning("event_collector: no KV events: %s. Where a daemon serves the node, "
                                  "start it with FLEXKV_ENABLE_KV_EVENTS=1", e)
            return
        with self._lock:
            self._source = source

    def _add(self, event: Any) -> None:
        with self._lock:
            self._events.append(event)

    def publish_stored(self, block_hashes: np.ndarray, block_size: int = 16,
                       lora_id: int | None = None, medium: str | None = "CPU") -> None:
        self._add(self._make.stored(block_hashes=block_hashes.tolist(), parent_block_hash=None,
                                    token_ids=[], block_size=block_size, lora_id=lora_id,
                                    medium=medium, lora_name=None))

    def publish_removed(self, block_hashes: np.ndarray, medium: str | None = "CPU") -> None:
        self._add(self._make.removed(block_hashes=block_hashes.tolist(), medium=medium))

    def take_events(self) -> list[Any]:
        """Each event once."""
        with self._lock:
            events, self._events = self._events, []
            source = self._source
            while source is not None and (taken := source.take()):
                events += map(self._make.event, taken)
        return events

    def close(self) -> None:
        """What was collected can still be taken."""
        with self._lock:
            source, self._source = self._source, None
            if source is not None:
                source.close()
