"""KV events: what routers (NVIDIA Dynamo's, for one) are told of FlexKV's tiers, in the engine's own
stream, which both connectors' take_events feed. A second stream for the same worker would not do:
routers take it for another start of the worker, and forget the first.

Only blocks of full attention are announced: they are what a prefix hit needs in any model. Called by
the scheduler's thread; with events off there is no object of this class, and nothing is asked for.
"""
from __future__ import annotations

import logging
import time
from typing import Any

from flexkv._flexkv import Error

from . import versions
from .groups import FULL
from .requests import Chain, Label, Request, Space

logger = logging.getLogger("vllm.flexkv")

BLOCKS = 1024           # in one call; their token ids become Python lists
SECONDS = 0.02          # in one step; after a restart there may be a whole store to announce


def open_events(node: Any, spaces: list[Space], vllm_config: Any, wanted: bool) -> Events | None:
    """None where nobody would hear them. Of the two sides that must want them (FlexKV, and the engine,
    whose stream it is) the one that does not is named."""
    config = getattr(vllm_config, "kv_events_config", None)
    heard = config is not None and getattr(config, "enable_kv_cache_events", False)
    if not wanted:
        return None
    if not heard:
        logger.info("FlexKV: no KV events: the engine publishes none; to have them give it "
                    '--kv-events-config \'{"enable_kv_cache_events":true,"publisher":"zmq",...}\'')
        return None
    space = next((s for s in spaces if s.group.kind == FULL), None)
    if space is None:
        logger.info("FlexKV: no KV events: no layer has full attention")
        return None
    if versions.events_by_digest():
        logger.warning("FlexKV: no KV events: the engine's have whole digests for hashes; unset "
                       "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES to have FlexKV's beside them")
        return None
    try:
        source = node.events(space.space)
    except Error as e:
        logger.warning("FlexKV: no KV events: %s. Where a daemon serves the node, it must be started "
                       "with DYNAMO_USE_FLEXKV=1 too", e)
        return None
    logger.info("FlexKV: KV events of space %s go with the engine's", space.space.name)
    return Events(source, space)


class Events:
    def __init__(self, source: Any, space: Space) -> None:
        self._source = source
        self._space = space
        self._make = versions.EventMaker()
        self._labels: dict[Any, Label] = {}     # the last one of each namespace
        self._cached: Any = None        # what the engine's pool has cached, as an object

    def label(self, engine: Any, parts: tuple[str, ...]) -> Label | None:
        """How a router knows the request's blocks: by LoRA name and cache salt. None: not at all, and
        the blocks stay unannounced, as it would take others' for them. Token ids don't tell pictures
        apart, and routers know nothing of namespaces (parts) of another kind."""
        if (parts or getattr(engine, "mm_features", None)
                or getattr(engine, "prompt_embeds", None) is not None):
            return None
        lora = engine.lora_request
        label = Label(lora.lora_name if lora is not None else None,
                      getattr(engine, "cache_salt", None) or None)
        return label if self._make.fits(label) else None

    def names(self, request: Request, chain: Chain, first: int, blocks: int) -> dict[str, Any]:
        """What put is told of blocks [first, blocks) of the chain."""
        label = chain.label
        if label is None or chain.space is not self._space:
            return {}
        if self._labels.get(chain.namespace) != label:
            # Salts are in the engine's hashes, so requests of all salts share a namespace, whose label
            # is that of what is put next.
            if len(self._labels) >= 4096:
                self._labels.clear()
            chain.namespace.label(label.lora_name, label.cache_salt)
            self._labels[chain.namespace] = label
        k, size = chain.space.hashes_per_block, chain.space.block_size
        hashes = request.engine.block_hashes
        return {"event_hashes": hashes[first * k + k - 1:blocks * k:k],
                "event_tokens": request.engine.all_token_ids[first * size:blocks * size],
                "event_parent": hashes[first * k - 1] if first else None}

    def take(self, pool: Any) -> list[Any]:
        """For the engine's next batch. What is left when the time is up comes with the next step."""
        if pool is not None:
            self._look_at(pool)
        taken = self._source.take(BLOCKS)
        if not taken:
            return []
        events: list[Any] = []
        deadline = time.monotonic() + SECONDS
        while taken:
            events += map(self._make.event, taken)
            taken = self._source.take(BLOCKS) if time.monotonic() < deadline else []
        return events

    def _look_at(self, pool: Any) -> None:
        """When the engine clears its cache it says so in the stream, and a router then forgets all that
        the worker has, in every tier. The pool begins with a new table then."""
        cached = getattr(pool, "cached_block_hash_to_block", None)
        if cached is not self._cached:
            if self._cached is not None:
                self._source.again()
            self._cached = cached

    def close(self) -> None:
        self._source.close()
