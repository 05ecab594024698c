"""From the first question to the last byte of a load: matches, leases, gets, and what becomes of
them when they fail or nobody wants them any more.

A get is started as soon as the engine has allocated the blocks, and the node commands the workers'
agents by itself: no step of the engine is needed for it. A load that failed goes to the workers
with the next step; they make sure that nothing writes the blocks any more, then tell the engine.

Where the engine allows it, loads can belong to one of its steps (see modes.py): it waits for them
as a whole, or its layers do, each for its part. How the latter end the workers see for themselves.
"""
from __future__ import annotations

import logging
import time
from typing import Any

from flexkv._flexkv import EARLY, PAGES_BUSY, Error

from . import versions
from .context import Context
from .modes import load_modes
from .protocol import FailedLoad, LayerLoad
from .requests import Chain, Load, Offer, Part, Request
from .stores import Stores

logger = logging.getLogger("vllm.flexkv")

# A block or less that the engine would get through one more round of its loop is computed in
# the same time, unless blocks are large.
SMALL_BLOCK = 64        # tokens
GRACE = 10.0            # seconds after its deadline in which an operation must have ended
# An engine that has nothing to compute sleeps a millisecond between two looks. A look at which a load is
# about to end waits for it, so that the engine does not sleep once more.
NEARLY = 0.0015         # seconds around its expected end
TIMED_BLOCKS = 64       # smaller loads say little about how long one takes
AHEAD = 0.002           # seconds by which a load that is reported early is, besides a share of it (END_US)


class Loads:
    def __init__(self, context: Context, stores: Stores, vllm_config: Any, *, full: bool) -> None:
        """full: all hooks of our own connector class are called."""
        self._c = context
        self._stores = stores
        windows = any(s.group.partial for s in context.spaces)
        self.sync, self._layerwise = load_modes(context.settings, vllm_config, context.spaces,
                                                full=full)
        # From a block within the load nothing can be computed where a window needs blocks before it: the
        # engine has left them out.
        self._whole = len(context.spaces) > 1 or windows
        self._how = {"layerwise": True} if self._layerwise else {}
        # Not where a step may zero pages that an aborted request, whose load was on its way, has given back.
        self._early_fits = len(context.spaces) == 1 and not windows and not self._layerwise
        self._fenced: bool | None = None        # all steps that computed were; None: there was none
        self._arriving: list[int] = []          # operations that were reported, and are on their way
        # Else the engine sees to it that steps under way don't write blocks that it gives us.
        self._guarded = versions.overlapping(vllm_config) and not versions.defers_frees()
        self._blind = False                     # nobody says which steps have come back
        self._computing = 0                     # the last step that writes KV
        self._back = 0                          # the last step that has come back
        # A prompt that is loaded as a whole has its last token computed again. Its window then
        # begins one token earlier than that of the blocks the engine gave us.
        self._spare = 1 if self.sync or windows else 0
        self._reuse = min(context.settings.lease_timeout / 3, 5.0)
        self._by_op: dict[int, Load] = {}
        self._active: dict[Load, None] = {}     # oldest first
        self._received: list[Request] = []
        self._failed: list[FailedLoad] = []
        self._written: set[int] = set()         # pages of synchronous loads
        self._pace = 0.0                        # seconds a block of a load took lately; 0: not known
        self._ahead = 0.0

    # ---- before there are blocks ---------------------------------------------------------------

    def offer(self, request: Request, local: int) -> int:
        """How many tokens beyond the local ones can be loaded. The engine may ask again at each
        step without ever taking them."""
        if request.no_load or request.load is not None or self._blind:
            return 0
        limit = request.engine.num_tokens - self._spare
        if not self._worthwhile(limit - limit % self._c.alignment - local, local):
            self.release(request)       # whatever is found: don't look
            return 0
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
        if not self._worthwhile(gain, local):
            self._release(offer)
            return 0
        request.offer = offer
        return gain

    def _worthwhile(self, gain: int, local: int) -> bool:
        if gain > self._c.alignment:
            return True
        return gain > 0 and not local and self._c.alignment >= SMALL_BLOCK

    def _match(self, request: Request, local: int, limit: int, now: float) -> Offer:
        """The longest prefix that all groups have."""
        request.extend_keys()
        offer = Offer(local, limit, limit, limit, limit, [], now)
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
            offer.near_tokens = min(offer.near_tokens, (found.blocks - found.peer_blocks) * size)
            if not chain.begun:
                # What comes from other nodes has no names for KV events yet: the first put, which copies
                # nothing of it, brings them.
                chain.stored = found.blocks - (found.peer_blocks if self._c.events else 0)
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
        near = max(0, min(end, offer.near_tokens) - offer.local)
        request.sources = (from_cpu, near - from_cpu, tokens - near)
        for chain, lease in zip(request.chains, offer.leases):
            part = self._part(chain, lease, tables, offer.local, end)
            if part.pages:
                load.waiting.append(part)
            else:
                self._drop_lease(lease)
        load.blocked = self._stores.stop_overtaken(load.waiting)
        if self._guarded:
            load.after = self._computing
        self._launch_if_free(load)

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

    def _launch_if_free(self, load: Load) -> None:
        """Nobody reads or writes its pages any more."""
        if not load.blocked and load.after <= self._back and not load.ended:
            self._launch(load)

    def _launch(self, load: Load) -> None:
        parts, load.waiting = load.waiting, []
        how = {"early": True} if self._early_fits and self._fenced else self._how
        load.launched = time.monotonic()
        load.blocks = sum(len(part.pages) for part in parts)
        for part in parts:
            if load.failed:
                load.bad += part.pages
                self._drop_lease(part.lease)
                continue
            try:
                op = self._c.node.get(part.lease, part.first, part.pages, **how)
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
        if completion.flags & EARLY:
            load.early = True
            self._arriving.append(completion.op)
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

    def nearly_done(self) -> bool:
        """Nothing is being computed, and the oldest load ends about now."""
        if not self._active or self._computing > self._back or not self._pace:
            return False
        load = next(iter(self._active))
        left = load.launched + load.blocks * self._pace - self._ahead - time.monotonic()
        return not load.sync and not load.waiting and abs(left) < NEARLY

    def _time(self, load: Load) -> None:
        """Loads from SSD take as long as the disk likes."""
        if load.blocks >= TIMED_BLOCKS and not load.request.sources[1]:
            self._ahead = AHEAD if load.early else 0.0
            pace = (time.monotonic() - load.launched + self._ahead) / load.blocks
            self._pace = pace if not self._pace else min(pace, 0.75 * self._pace + 0.25 * pace)

    def unblock(self, op: int) -> None:
        """A put has ended that read pages which a load is to write."""
        for load in [a for a in self._active if op in a.blocked]:
            load.blocked.discard(op)
            self._launch_if_free(load)

    def computes(self, step: int) -> None:
        """A step goes to the workers, and writes KV."""
        self._computing = step

    def computed(self, fenced: bool) -> None:
        """A step that computed has come back. Loads may be reported while they are on their way if
        workers can have their streams wait before any step computes."""
        self._fenced = fenced and self._fenced is not False

    def came_back(self, step: int) -> None:
        self._back = step
        if self._guarded:
            for load in [a for a in self._active if a.waiting]:
                self._launch_if_free(load)

    def nobody_says(self) -> None:
        """Which steps have come back, that is. Where it matters nothing can be loaded."""
        self._blind = self._guarded
        if self._guarded:
            for load in [a for a in self._active if a.after > self._back]:
                load.failed = True
                self._launch(load)      # which gives the leases back, as the load has failed

    def _end(self, load: Load) -> None:
        request = load.request
        load.ended = True
        self._active.pop(load, None)
        if load.failed:
            self._c.count["failed_loads"] += load.told or not request.finished
            request.no_load = True
            for chain in request.chains:
                chain.forget()
            if not load.told and (load.busy or not request.finished):
                self._report(load)
                return
        else:
            for chain in request.chains:
                if not chain.begun:
                    chain.stored = max(chain.stored, load.end // chain.space.block_size)
            self._time(load)
            self._c.count["loads"] += 1
            self._c.count["early_loads"] += load.early
            for name, tokens in zip(("cpu", "ssd", "peer"), request.sources):
                self._c.count[f"hit_{name}_tokens"] += tokens
        if not load.sync:
            self._received.append(request)
        elif request.load is load:
            request.load = None

    def take_layerwise(self) -> list[LayerLoad]:
        """Loads on which the step that goes out now computes as they come."""
        if not self._layerwise:
            return []
        loads = [load for load in self._active if not load.told]
        for load in loads:
            load.told = True
            self._written.update(p for part in load.parts.values() for p in part.pages)
        return [LayerLoad(load.request.id, load.ops,
                          [p for part in load.parts.values() for p in part.pages])
                for load in loads]

    def take_arriving(self) -> list[int]:
        """For the very next step, whatever it computes: its workers' streams wait for them."""
        arriving, self._arriving = self._arriving, []
        return arriving

    def take_written(self) -> set[int]:
        written, self._written = self._written, set()
        return written

    def _report(self, load: Load) -> None:
        """By way of the workers: only they can stop an agent for good, and the engine hears of
        bad blocks from nobody else. A load whose request is gone has no bad blocks."""
        request = load.request
        bad = [] if request.finished else load.bad
        self._failed.append(FailedLoad(
            request.id, load.ops, bad, whole=bool(bad) and self._whole, waiting=not load.sync))
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
        if load.told:           # the step that it belongs to has come back, and the load with it
            request.load = None
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
        """Before the step that needs them: for synchronous loads; layerwise ones just begin."""
        deadline = time.monotonic() + self._c.settings.op_timeout + GRACE
        while any(load.waiting if self._layerwise else load.sync for load in self._active):
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
