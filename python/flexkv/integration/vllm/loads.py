"""From the first question to the last byte of a load: matches, leases, gets, and what becomes of
them when they fail or nobody wants them any more.

A get is started as soon as the engine has allocated the blocks, and the node commands the workers'
agents by itself: no step of the engine is needed for it. A load that failed goes to the workers
with the next step; they make sure that nothing writes the blocks any more, then tell the engine.
"""
from __future__ import annotations

import logging
import time
from typing import Any

from flexkv._flexkv import PAGES_BUSY, Error

from .context import Context
from .protocol import FailedLoad
from .requests import Chain, Load, Offer, Part, Request
from .stores import Stores

logger = logging.getLogger("vllm.flexkv")

# A block or less that the engine would get through one more round of its loop is computed in
# the same time, unless blocks are large.
SMALL_BLOCK = 64        # tokens
GRACE = 10.0            # seconds after its deadline in which an operation must have ended


class Loads:
    def __init__(self, context: Context, stores: Stores, *, overlap: bool) -> None:
        """overlap: steps are scheduled before the ones before them have come back."""
        self._c = context
        self._stores = stores
        windows = any(s.group.partial for s in context.spaces)
        self.sync = context.settings.sync_get and self._can_sync(overlap)
        # A prompt that is loaded as a whole has its last token computed again. Its window then
        # begins one token earlier than that of the blocks the engine gave us.
        self._spare = 1 if self.sync or windows else 0
        self._reuse = min(context.settings.lease_timeout / 3, 5.0)
        self._by_op: dict[int, Load] = {}
        self._active: dict[Load, None] = {}     # oldest first
        self._received: list[Request] = []
        self._failed: list[FailedLoad] = []
        self._written: set[int] = set()         # pages of synchronous loads

    def _can_sync(self, overlap: bool) -> bool:
        """A synchronous load that fails is told by block numbers, which are ambiguous with several
        groups; and a step scheduled after it would go on from what was not loaded."""
        reason = None
        if len(self._c.spaces) > 1 or self._c.spaces[0].group.partial:
            reason = "with this model's KV cache groups"
        elif overlap:
            reason = ("when steps overlap (asynchronous scheduling, see --no-async-scheduling, or "
                      "pipeline parallelism)")
        if reason is not None:
            logger.warning("FlexKV: FLEXKV_SYNC_GET has no effect %s: loads are asynchronous",
                           reason)
        return reason is None

    # ---- before there are blocks ---------------------------------------------------------------

    def offer(self, request: Request, local: int) -> int:
        """How many tokens beyond the local ones can be loaded. The engine may ask again at each
        step without ever taking them."""
        if request.no_load or request.load is not None:
            return 0
        limit = request.engine.num_tokens - self._spare
        now = time.monotonic()
        offer = request.offer
        if offer is not None:
            if (offer.local == local and offer.limit == limit
                    and now - offer.time < self._reuse):
                return offer.tokens - local
            self.release(request)
        try:
            offer = self._match(request, local, limit, now)
        except Error as e:
            self._c.trouble("match", e)
            return 0
        if not request.counted:
            request.counted = True
            self._c.count["query_tokens"] += request.engine.num_tokens - local
        gain = offer.tokens - local
        if gain <= 0 or (gain <= self._c.alignment
                         and (local or self._c.alignment < SMALL_BLOCK)):
            self._release(offer)
            return 0
        request.offer = offer
        return gain

    def _match(self, request: Request, local: int, limit: int, now: float) -> Offer:
        """The longest prefix that all groups have."""
        request.extend_keys()
        offer = Offer(local, limit, limit, limit, [], now)
        for chain in request.chains:
            size = chain.space.block_size
            blocks = min(offer.tokens // size, chain.count)
            try:
                found = chain.namespace.match(chain.head(blocks)) if blocks else None
            except Error:
                self._release(offer)
                raise
            if found is None or not found.blocks:
                offer.tokens = 0
                break
            offer.leases.append(found.lease)
            offer.tokens = min(offer.tokens, found.blocks * size)
            offer.cpu_tokens = min(offer.cpu_tokens, found.cpu_blocks * size)
            if not chain.begun:
                chain.stored = found.blocks
            if offer.tokens <= local:
                break
        offer.tokens -= offer.tokens % self._c.alignment
        return offer

    def release(self, request: Request) -> None:
        offer, request.offer = request.offer, None
        if offer is not None:
            self._release(offer)

    def _release(self, offer: Offer) -> None:
        for lease in offer.leases:
            self._drop_lease(lease)

    def _drop_lease(self, lease: int) -> None:
        if lease:
            try:
                self._c.node.release(lease)
            except Error:
                pass        # it ran out, or its node is gone

    # ---- the load ------------------------------------------------------------------------------

    def start(self, request: Request, tables: tuple[list[int], ...], tokens: int) -> None:
        """The engine has allocated blocks for the offer, or for a part of it."""
        offer, request.offer = request.offer, None
        if offer is None or offer.local + tokens > offer.tokens:
            raise RuntimeError(f"FlexKV: request {request.id} is to load {tokens} tokens that "
                               "were not offered")
        end = offer.local + tokens
        load = Load(request, end, self.sync, offer.time, [])
        request.load = load
        self._active[load] = None
        from_cpu = max(0, min(end, offer.cpu_tokens) - offer.local)
        request.sources = (from_cpu, tokens - from_cpu)
        for chain, lease in zip(request.chains, offer.leases):
            part = self._part(chain, lease, tables, offer.local, end)
            if part.pages:
                load.waiting.append(part)
            else:
                self._drop_lease(lease)
        load.blocked = self._stores.stop_overtaken([p for w in load.waiting for p in w.pages])
        if not load.blocked:
            self._launch(load)

    def _part(self, chain: Chain, lease: int, tables: tuple[list[int], ...], start: int,
              end: int) -> Part:
        """Blocks that a window has left behind have no page and are not needed."""
        size, group = chain.space.block_size, chain.space.group
        first = start // size
        pages = tables[group.index][first:end // size]
        if group.partial:
            skip = 0
            while skip < len(pages) and pages[skip] == self._c.null_page:
                skip += 1
            first, pages = first + skip, pages[skip:]
        return Part(chain, lease, first, pages)

    def _launch(self, load: Load) -> None:
        parts, load.waiting = load.waiting, []
        for part in parts:
            if load.failed:
                load.bad += part.pages
                self._drop_lease(part.lease)
                continue
            try:
                op = self._c.node.get(part.lease, part.first, part.pages)
            except Error as e:
                self._c.trouble("load", e)
                load.failed = True
                load.bad += part.pages
                continue
            load.ops.append(op)
            load.parts[op] = part
            self._by_op[op] = load
        if load.failed:
            self._cancel(load)
        if not load.parts:
            self._end(load)

    def _cancel(self, load: Load) -> None:
        for op in load.parts:
            try:
                self._c.node.cancel(op)
            except Error as e:
                self._c.trouble("cancel", e)

    def completed(self, completion: Any) -> bool:
        load = self._by_op.pop(completion.op, None)
        if load is None:
            return False
        part = load.parts.pop(completion.op)
        good = completion.blocks_ok if completion.status < 0 else len(part.pages)
        if load.spoiled:
            good = 0
        if completion.flags & PAGES_BUSY:
            load.busy = True
        self._c.count["loaded_blocks"] += good
        if load.sync:
            self._written.update(part.pages[:good])
        if good < len(part.pages):
            load.failed = True
            load.bad += part.pages[good:]
            if not load.request.finished:
                self._c.trouble("load", f"status {completion.status}, "
                                f"{good} of {len(part.pages)} blocks loaded")
        if not load.parts and not load.waiting:
            self._end(load)
        return True

    def unblock(self, op: int) -> None:
        """A put has ended that read pages which a load is to write."""
        for load in [a for a in self._active if op in a.blocked]:
            load.blocked.discard(op)
            if not load.blocked and not load.ended:
                self._launch(load)

    def _end(self, load: Load) -> None:
        request = load.request
        load.ended = True
        self._active.pop(load, None)
        if load.failed:
            self._c.count["failed_loads"] += not request.finished
            request.no_load = True
            for chain in request.chains:
                chain.forget()
            if load.busy or not request.finished:
                self._report(load)
                return
        else:
            for chain in request.chains:
                if not chain.begun:
                    chain.stored = max(chain.stored, load.end // chain.space.block_size)
            self._c.count["loads"] += 1
            self._c.count["hit_cpu_tokens"] += request.sources[0]
            self._c.count["hit_ssd_tokens"] += request.sources[1]
        if load.sync:
            request.load = None
        else:
            self._received.append(request)

    def take_written(self) -> set[int]:
        written, self._written = self._written, set()
        return written

    def _report(self, load: Load) -> None:
        """By way of the workers: only they can stop an agent for good, and the engine hears of
        bad blocks from nobody else. A load whose request is gone has no bad blocks."""
        request = load.request
        bad = [] if request.finished else load.bad
        self._failed.append(FailedLoad(
            request.id, load.ops, bad, whole=bool(bad) and len(self._c.spaces) > 1,
            waiting=not load.sync))
        if load.sync:
            request.load = None
        else:
            load.reported = True

    # ---- the engine's steps --------------------------------------------------------------------

    def abandon(self, request: Request) -> bool:
        """The request has ended. True if a load is still under way: the engine keeps the blocks
        until it is told that the load has ended."""
        self.release(request)
        load = request.load
        if load is None:
            return False
        if not load.ended:
            load.failed = True
            if load.waiting:
                self._launch(load)      # which gives the leases back, as the load has failed
            else:
                self._cancel(load)
        return True

    def spoil(self) -> None:
        """The cache is being reset: what loads under way bring is old."""
        for load in self._active:
            load.spoiled = True

    def wait(self, poll: Any) -> None:
        """For synchronous loads, before the step that needs them."""
        deadline = time.monotonic() + self._c.settings.op_timeout + GRACE
        while any(load.sync for load in self._active):
            poll(50)
            if time.monotonic() > deadline:
                self.give_up(0)
                return

    def give_up(self, after: float) -> None:
        """Operations end by their own deadlines. Should one not, its load has failed, and its
        blocks are used again only when the agents have been told."""
        oldest = time.monotonic() - after
        while self._active:
            load = next(iter(self._active))
            if load.time > oldest:
                return
            self._c.trouble("load", f"no answer about operations {list(load.parts)}")
            for op, part in load.parts.items():
                del self._by_op[op]
                load.bad += part.pages
            for part in load.waiting:
                load.bad += part.pages
                self._drop_lease(part.lease)
            load.parts, load.waiting, load.failed, load.busy = {}, [], True, True
            self._end(load)

    def take_failed(self) -> list[FailedLoad]:
        failed, self._failed = self._failed, []
        return failed

    def take_received(self) -> list[Request]:
        received, self._received = self._received, []
        for request in received:
            request.load = None
        return received

    @property
    def pending(self) -> bool:
        return bool(self._active or self._received or self._failed)
