"""The scheduler's side of both connectors: opens the node, follows requests and steps, and hands
what concerns loads and stores to loads.py and stores.py.

All calls come from the engine's scheduler thread. Trouble with FlexKV after start-up is a miss and
a line in the log; at start-up it is an error that says what to change.
"""
from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from flexkv._flexkv import Error

from . import identity
from .context import Context
from .events import open_events
from .groups import alignment, groups_of, hash_block_size
from .loads import GRACE, Loads
from .node import open_node
from .protocol import LayerLoad, StepMetadata, StepStats
from .rate import PrefillRate
from .requests import Chain, Request, Space
from .settings import Settings
from .stores import Step, Stores
from .tables import BlockTables

logger = logging.getLogger("vllm.flexkv")

PREFILL_CHUNK = 16          # tokens of one request in one step from which it counts as prefill
GAUGE_INTERVAL = 10.0       # seconds between looks at how full the tiers are
LOOK_MS = 2                 # for a load that is about to end


class SchedulerSide:
    def __init__(self, vllm_config: Any, kv_cache_config: Any | None, settings: Settings, *,
                 full: bool) -> None:
        """full: all hooks of our own connector class are called, so blocks are stored as they
        fill; else when a request ends."""
        self._full = full
        transfer = vllm_config.kv_transfer_config
        groups = groups_of(vllm_config, kv_cache_config)
        self._hash_tokens = hash_block_size(vllm_config, kv_cache_config, groups)
        if identity.fix_hash_seed(vllm_config):
            logger.info("FlexKV: PYTHONHASHSEED set to %s in the scheduler's process, so that block "
                        "hashes are the same after a restart", identity.OUR_SEED)
        self._private = identity.private_part(vllm_config)
        self._adapters = identity.Adapters()
        self._requests: dict[str, Request] = {}
        self._tables = BlockTables()
        self._steps: deque[Step] = deque()
        self._step = 0
        self._hashes_agree = True
        self._gauges_at = 0.0

        self._node = open_node(settings, len(groups))
        try:
            spaces = self._open_spaces(vllm_config, groups)
        except BaseException:
            self._node.close()
            raise
        self._c = Context(settings, self._node, spaces, alignment(groups))
        self._c.events = open_events(self._node, spaces, vllm_config, settings.events)
        self._rate = PrefillRate([s.space for s in spaces])
        self._stores = Stores(self._c, enabled=transfer.is_kv_producer,
                              drafts=getattr(vllm_config, "speculative_config", None) is not None)
        self._loads = Loads(self._c, self._stores, vllm_config, full=full)
        self._may_load = transfer.is_kv_consumer
        self._prefetches = full and self._may_load and self._has_ssd()
        self._give_up_after = settings.op_timeout + settings.lease_timeout + GRACE

    def _open_spaces(self, vllm_config: Any, groups: list[Any]) -> list[Space]:
        engine = identity.engine_identity(vllm_config)
        parallel = vllm_config.parallel_config
        replicas = identity.kv_replicas(vllm_config)
        workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        spaces = []
        for group in groups:
            fingerprint = identity.group_identity(engine, group, len(groups))
            name = identity.space_name(vllm_config, group, len(groups), fingerprint)
            space = self._node.space(
                name, fingerprint=fingerprint, tokens_per_block=group.block_size,
                ranks=workers // replicas, workers=workers,
                instance=str(vllm_config.kv_transfer_config.engine_id))
            spaces.append(Space(group, group.block_size // self._hash_tokens, space))
            logger.info("FlexKV: space %s: %s attention, %d tokens in a block, %d workers", name,
                        group.kind, group.block_size, workers)
        return spaces

    def _has_ssd(self) -> bool:
        try:
            return self._node.stats()["ssd"]["slots"] > 0
        except Error:
            return False

    # ---- requests ------------------------------------------------------------------------------

    def _request(self, engine: Any) -> Request | None:
        request = self._requests.get(engine.request_id)
        if request is not None:
            return request
        if getattr(engine, "resumable", False) or not self._check_hashes(engine):
            return None         # a resumed session's tokens change after the fact
        parts = identity.requested_parts(engine)
        label = self._c.events.label(engine, parts) if self._c.events is not None else None
        if engine.lora_request is not None:
            parts += self._adapters.parts(engine.lora_request)
        parts += self._private
        try:
            chains = [Chain(space, parts, label) for space in self._c.spaces]
        except Error as e:
            self._c.trouble("namespace", e)
            return None
        request = self._requests[engine.request_id] = Request(engine, chains)
        return request

    def _check_hashes(self, engine: Any) -> bool:
        """Keys are made of the engine's block hashes. Should they cover other numbers of tokens
        than we think, nothing may be stored under them."""
        if self._hashes_agree and len(engine.block_hashes) != engine.num_tokens // self._hash_tokens:
            self._hashes_agree = False
            logger.error("FlexKV: a request of %d tokens has %d block hashes, not one for every %d "
                         "tokens: nothing is cached", engine.num_tokens, len(engine.block_hashes),
                         self._hash_tokens)
        return self._hashes_agree

    def arrived(self, engine: Any) -> None:
        """A request was queued: what the SSD has of it can be on its way before its turn."""
        if not self._prefetches:
            return
        request = self._request(engine)
        if request is None or engine.skip_reading_prefix_cache:
            return
        request.extend_keys()
        for chain in request.chains:
            if chain.keys and not chain.space.group.partial:
                try:
                    chain.namespace.prefetch(chain.keys)
                except Error as e:
                    self._c.trouble("prefetch", e)

    def matched_tokens(self, engine: Any, local: int) -> tuple[int, bool]:
        if not self._may_load or engine.skip_reading_prefix_cache:
            self._request(engine)
            return 0, False
        request = self._request(engine)
        tokens = self._loads.offer(request, local) if request is not None else 0
        return tokens, tokens > 0 and not self._loads.sync

    def allocated(self, engine: Any, blocks: Any, tokens: int) -> None:
        request = self._requests.get(engine.request_id)
        if request is None:
            return
        if tokens > 0:
            self._loads.start(request, blocks.get_block_ids(), tokens)
        else:
            self._loads.release(request)

    def hit_sources(self, engine: Any) -> tuple[int, int, int]:
        """Tokens of the request's load that come from cpu, from SSD, and from elsewhere."""
        request = self._requests.get(engine.request_id)
        return request.sources if request is not None else (0, 0, 0)

    def finished(self, engine: Any, tables: tuple[list[int], ...]) -> bool:
        """True if the engine must keep the request's blocks until it is told that they have been
        sent. Where a load is under way it keeps them by itself."""
        request = self._requests.get(engine.request_id)
        if request is None:
            return False
        request.finished = True
        self._tables.drop(request.id)
        if self._loads.abandon(request):
            return False
        delayed = self._stores.finish(request, None if self._full else tables)
        if not delayed:
            self._forget(request)
        return delayed

    def _forget(self, request: Request) -> None:
        self._requests.pop(request.id, None)

    # ---- steps ---------------------------------------------------------------------------------

    def build_meta(self, output: Any) -> StepMetadata:
        self._step += 1
        self._poll(0)
        self._loads.give_up(self._give_up_after)
        fence = self._preempted(output)
        step = self._follow(output)
        layerwise: list[LayerLoad] = []
        if output.total_num_scheduled_tokens:
            self._loads.computes(self._step)
            if self._loads.sync:
                self._loads.wait(self._poll)
                layerwise = self._loads.take_layerwise()
                self._keep_loaded(output)
        if step.scheduled:
            step.start = time.monotonic()
            self._steps.append(step)
        return StepMetadata(self._step, fence, self._loads.take_failed(), layerwise,
                            self._loads.take_arriving())

    def _preempted(self, output: Any) -> list[int]:
        fence: list[int] = []
        for request_id in output.preempted_req_ids or ():
            request = self._requests.get(request_id)
            if request is not None:
                fence += self._stores.preempted(request)
        return fence

    def _follow(self, output: Any) -> Step:
        step = Step(self._step)
        requests, scheduled = self._requests, step.scheduled
        if self._full:
            self._tables.step(output)
        for request_id, tokens in output.num_scheduled_tokens.items():
            if tokens >= PREFILL_CHUNK:
                step.prefill_tokens += tokens
            request = requests.get(request_id)
            if request is None:
                continue
            if self._full and self._stores.fills_block(request, tokens):
                tables = self._tables.of(request_id)
                if tables is not None:
                    self._stores.add_fill(step, request, tables)
            request.in_flight += tokens
            scheduled.append((request, tokens))
        return step

    def _keep_loaded(self, output: Any) -> None:
        """New blocks that the workers would zero at the start of the step hold loaded KV already,
        or will."""
        zero = getattr(output, "new_block_ids_to_zero", None)
        if zero:
            loaded = self._loads.take_written()
            output.new_block_ids_to_zero = [b for b in zero if b not in loaded] or None
        else:
            self._loads.take_written()

    def update(self, connector_output: Any, number: int, fenced: bool) -> None:
        """A step's output has come back; number: which, 0 if nobody says; fenced: see StepStats.
        Requests whose loads or stores have ended are added to what the workers report."""
        now = time.monotonic()
        self._reported(connector_output)
        self._poll(0)
        if number:
            while self._steps and self._steps[0].number <= number:
                step = self._steps.popleft()
                self._stores.settle(step)
                self._rate.step(step.prefill_tokens, step.start, now)
                self._loads.computed(fenced)
            self._loads.came_back(number)
        elif connector_output is not None:
            self._without_number()
        if self._loads.nearly_done():
            self._poll(LOOK_MS)
        received = self._loads.take_received()
        sent = self._stores.take_sent()
        if received:
            connector_output.finished_recving = {r.id for r in received} | set(
                connector_output.finished_recving or ())
        if sent:
            connector_output.finished_sending = {r.id for r in sent} | set(
                connector_output.finished_sending or ())
        for request in sent:
            self._forget(request)
        for request in received:
            if request.finished:
                self._forget(request)

    def _reported(self, connector_output: Any) -> None:
        """Failed loads that the workers have told the engine of."""
        for request_id in connector_output.finished_recving or ():
            request = self._requests.get(request_id)
            if request is not None and request.load is not None and request.load.reported:
                request.load = None
                if request.finished:
                    self._forget(request)

    def _without_number(self) -> None:
        self._c.trouble("store", "the engine drops the workers' statistics, which say what step "
                        "has come back: nothing is stored")
        self._loads.nobody_says()
        for request in list(self._requests.values()):
            if request.finished and request.delayed:
                self._stores.give_up(request)

    def _poll(self, timeout_ms: int) -> None:
        try:
            completions = self._node.poll(256, timeout_ms)
        except Error as e:
            self._c.trouble("poll", e)
            return
        for completion in completions:
            if self._loads.completed(completion):
                continue
            if self._stores.completed(completion):
                self._loads.unblock(completion.op)

    # ---- the rest ------------------------------------------------------------------------------

    def bind_pool(self, pool: Any) -> None:
        self._c.pool = pool
        self._c.null_page = pool.null_block.block_id

    @property
    def pending(self) -> bool:
        """Something is under way that only further steps of the engine bring to its end."""
        return self._loads.pending or self._stores.pending

    def reset(self) -> bool:
        """Drops every block of the node, all engines' that share it. Loads under way fail, and
        what they were for is computed. Weights may be new ones now: requests that have KV of the
        old ones store nothing any more."""
        self._loads.spoil()
        for request in self._requests.values():
            self._loads.release(request)
            for chain in request.chains:
                chain.forget()
                chain.closed |= request.engine.num_computed_tokens > 0
        try:
            self._node.reset()
        except Error as e:
            logger.error("FlexKV: reset: %s", e)
            return False
        logger.info("FlexKV: cache reset")
        return True

    def take_events(self) -> list[Any]:
        """For the engine's stream of KV events, once a step."""
        if self._c.events is None:
            return []
        try:
            return self._c.events.take(self._c.pool)
        except Error as e:
            self._c.trouble("KV events", e)
            return []

    def stats(self) -> StepStats | None:
        """What has been counted since the last call, None if nothing."""
        now = time.monotonic()
        if now - self._gauges_at > GAUGE_INTERVAL:
            self._gauges_at = now
            self._gauges()
        if not self._c.count:
            return None
        stats = StepStats(data=dict(self._c.count))
        self._c.count.clear()
        return stats

    def _gauges(self) -> None:
        try:
            stats = self._node.stats()
        except Error as e:
            self._c.trouble("statistics", e)
            return
        for tier in ("cpu", "ssd"):
            slots = stats[tier]["slots"]
            if slots:
                self._c.count[tier + "_blocks"] = slots
                self._c.count[tier + "_used_blocks"] = slots - stats[tier]["free_slots"]

    def shutdown(self) -> None:
        if self._c.events is not None:
            self._c.events.close()
        self._node.close()
