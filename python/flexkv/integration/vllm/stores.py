"""Which blocks are stored, and when their pages may be read.

A block is stored once it holds the KV of tokens that are final: the step that filled it has come
back, and what is still under way, or was drafted and turned down, does not count. While the
node's agents read the pages nobody may write them:
  - A running request keeps its blocks. If the engine preempts it, the put is cancelled, and the
    workers stop its copies before the step that may use the blocks again.
  - A finished request keeps them until its puts have ended, as we ask the engine to.
  - Blocks that leave a sliding window go back to the engine at any time: they are held by a
    reference of our own.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexkv._flexkv import Error

from .context import Context
from .requests import Chain, Part, Put, Request

SHORT_PUTS = 3          # after so many that stored less than was asked, a request stores no more
Tables = tuple[list[int], ...]


@dataclass(slots=True)
class Step:
    """A step of the engine that is under way."""
    number: int
    start: float = 0.0
    prefill_tokens: int = 0
    scheduled: list[tuple[Request, int]] = field(default_factory=list)
    fills: list[tuple[Request, int, Tables]] = field(default_factory=list)  # and the epoch


class Stores:
    def __init__(self, context: Context, *, enabled: bool, drafts: bool) -> None:
        self._c = context
        self._enabled = enabled
        self._drafts = drafts
        self._by_op: dict[int, Put] = {}
        self._sent: list[Request] = []

    # ---- steps ---------------------------------------------------------------------------------

    def fills_block(self, request: Request, tokens: int) -> bool:
        """Will there be something to store after a step that computes so many tokens?"""
        return (self._enabled
                and request.engine.num_computed_tokens + tokens >= request.next_put)

    def add_fill(self, step: Step, request: Request, tables: Tables) -> None:
        request.open_steps += 1
        step.fills.append((request, request.epoch, tables))

    def settle(self, step: Step) -> None:
        """The step's output has come back."""
        for request, tokens in step.scheduled:
            request.in_flight -= tokens
        for request, epoch, tables in step.fills:
            request.open_steps -= 1
            if epoch == request.epoch:
                self._store(request, tables)
            if request.finished:
                self._close(request)
        for request, _ in step.scheduled:
            if request.final is not None:
                self._store_final(request)

    def finish(self, request: Request, tables: Tables | None) -> bool:
        """The request has ended. tables: to be stored from now; None if that was done as blocks
        filled. True if the engine must keep the blocks until the request is among sent()."""
        if tables is not None and self._enabled and self._anything(request):
            request.final = tables
            if not request.in_flight:
                self._store_final(request)
        request.delayed = not request.idle
        return request.delayed

    def give_up(self, request: Request) -> None:
        """Nobody says which steps have come back: nothing more can be stored."""
        request.final = None
        request.open_steps = 0
        request.epoch += 1
        self._close(request)

    def _anything(self, request: Request) -> bool:
        request.extend_keys()
        return any(min(request.engine.num_computed_tokens // c.space.block_size, c.count)
                   > c.stored for c in request.chains)

    def _store_final(self, request: Request) -> None:
        tables, request.final = request.final, None
        assert tables is not None
        self._store(request, tables)
        self._close(request)

    def _close(self, request: Request) -> None:
        if request.delayed and request.idle:
            request.delayed = False
            self._sent.append(request)

    def take_sent(self) -> list[Request]:
        sent, self._sent = self._sent, []
        return sent

    # ---- puts ----------------------------------------------------------------------------------

    def _store(self, request: Request, tables: Tables) -> None:
        request.extend_keys()
        computed = request.computed()
        if self._drafts and not request.finished:
            # Draft layers are computed after the output has been given back.
            computed, request.settled = min(computed, request.settled), computed
        next_put = 0
        for chain in request.chains:
            blocks = min(computed // chain.space.block_size, chain.count)
            if blocks > chain.stored and not chain.closed:
                self._put(request, chain, blocks, tables[chain.space.group.index])
            if not chain.closed:
                upto = (max(chain.stored, blocks) + 1) * chain.space.block_size
                next_put = min(next_put, upto) if next_put else upto
        request.next_put = next_put or 1 << 62

    def _put(self, request: Request, chain: Chain, blocks: int, table: list[int]) -> None:
        first = chain.stored if chain.begun or chain.space.group.partial else 0
        pages = table[first:blocks]
        if chain.space.group.partial:
            skip = self._left_behind(pages)
            first, pages = first + skip, pages[skip:]
        if len(pages) < blocks - first or self._has_null(chain, pages):
            chain.closed = True
            return
        if not pages:
            return
        events = self._c.events
        try:
            names = events.names(request, chain, first, blocks) if events is not None else {}
            op = chain.namespace.put(chain.head(blocks), first, pages, **names)
        except Error as e:
            self._c.trouble("store", e)
            return
        chain.begun = True
        chain.stored = blocks
        self._by_op[op] = put = Put(op, request, chain, first, pages, request.epoch,
                                    request.engine.num_preemptions,
                                    self._hold(pages) if chain.space.group.partial else None)
        if put.held is None:
            request.puts[op] = put

    def _has_null(self, chain: Chain, pages: list[int]) -> bool:
        """Blocks that hold nothing. They come in gaps where attention is partial; full attention has
        none, and of it the first block is looked at, as that would be where they begin."""
        return self._c.null_page in (pages if chain.space.group.partial else pages[:1])

    def _left_behind(self, pages: list[int]) -> int:
        """Leading blocks that were out of the window before they could be stored: known to the
        node from an earlier request, or the chain ends here."""
        skip = 0
        while skip < len(pages) and pages[skip] == self._c.null_page:
            skip += 1
        return skip

    def _hold(self, pages: Sequence[int]) -> list[Any]:
        blocks = [self._c.pool.blocks[page] for page in pages]
        self._c.pool.touch(blocks)
        return blocks

    def completed(self, completion: Any) -> bool:
        put = self._by_op.pop(completion.op, None)
        if put is None:
            return False
        request, chain = put.request, put.chain
        if put.held is not None:
            self._c.pool.free_blocks(reversed(put.held))
        good = completion.blocks_ok
        asked = completion.blocks
        self._c.count["stored_blocks"] += good
        if good < asked:
            self._c.count["dropped_blocks"] += asked - good
            if put.epoch == request.epoch:
                self._short(request, chain, put.first, good)
        request.puts.pop(put.op, None)
        if request.finished:
            self._close(request)
        return True

    def _short(self, request: Request, chain: Chain, first: int, good: int) -> None:
        """Less was stored than asked: no room, or the blocks before were evicted meanwhile."""
        request.short_puts += 1
        if chain.space.group.partial or request.short_puts >= SHORT_PUTS:
            chain.closed = True
        elif good:
            chain.stored = min(chain.stored, first + good)
        else:
            chain.forget()

    # ---- blocks that the engine takes away -------------------------------------------------------

    def preempted(self, request: Request) -> list[int]:
        """The operations that must not read the request's blocks any more."""
        request.epoch += 1
        request.next_put = 0
        request.settled = 0
        for chain in request.chains:
            chain.forget()
        ops = list(request.puts)
        for op in ops:
            self._cancel(op)
        return ops

    def stop_overtaken(self, parts: list[Part]) -> set[int]:
        """The puts that still read pages of these loads, cancelled. It happens when requests were
        preempted between two steps and their blocks are loaded into at once."""
        overtaken = [put for put in self._by_op.values() if put.held is None
                     and put.preemptions != put.request.engine.num_preemptions]
        if not overtaken:
            return set()
        wanted = {page for part in parts for page in part.pages}
        ops = {put.op for put in overtaken if not wanted.isdisjoint(put.pages)}
        for op in ops:
            self._cancel(op)
        return ops

    def _cancel(self, op: int) -> None:
        try:
            self._c.node.cancel(op)
        except Error as e:
            self._c.trouble("cancel", e)

    @property
    def pending(self) -> bool:
        return bool(self._by_op or self._sent)
