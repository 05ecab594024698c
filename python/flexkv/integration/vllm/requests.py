"""What the scheduler's side knows of one request, from its arrival until the engine has all its
blocks back."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .groups import Group


@dataclass(frozen=True)
class Label:
    """How routers know a request's blocks."""
    lora_name: str | None = None
    cache_salt: str | None = None


class Space:
    """A group of the engine with its FlexKV space."""
    __slots__ = ("group", "block_size", "hashes_per_block", "space", "_namespaces")

    def __init__(self, group: Group, hashes_per_block: int, space: Any) -> None:
        self.group = group
        self.block_size = group.block_size
        self.hashes_per_block = hashes_per_block
        self.space = space
        self._namespaces: dict[tuple[str, ...], Any] = {}

    def namespace(self, parts: tuple[str, ...]) -> Any:
        ns = self._namespaces.get(parts)
        if ns is None:
            if len(self._namespaces) >= 4096:
                self._namespaces.clear()        # they are cheap to open again
            ns = self._namespaces[parts] = self.space.namespace(*parts)
        return ns


class Chain:
    """A request's blocks in one group: their keys, and how many of them are stored."""
    __slots__ = ("space", "namespace", "label", "keys", "count", "stored", "begun", "closed")

    def __init__(self, space: Space, parts: tuple[str, ...], label: Label | None) -> None:
        self.space = space
        self.namespace = space.namespace(parts)
        self.label = label      # None: its blocks make no events
        self.keys = b""
        self.count = 0          # keys
        self.stored = 0         # leading blocks that are stored or under way, as far as known here
        self.begun = False      # we stored those ourselves; else they may be gone since the match
        self.closed = False     # a block is missing that can't be had any more: store no further

    def extend(self, hashes: list[bytes]) -> None:
        k = self.space.hashes_per_block
        have = len(hashes) // k
        if have > self.count:
            new = hashes[self.count * k:have * k]
            self.keys += self.namespace.keys_from_hashes(new if k == 1 else new[k - 1::k])
            self.count = have

    def head(self, blocks: int) -> bytes:
        """The keys of the leading blocks."""
        return self.keys if blocks == self.count else self.keys[:blocks * 16]

    def forget(self) -> None:
        """The engine's blocks are other ones now, or what was stored is gone."""
        if not self.space.group.partial:
            self.stored = 0
            self.begun = False


@dataclass(slots=True)
class Offer:
    """What a match found and the engine was told: it may take it, ask again, or neither."""
    local: int              # tokens that the engine has itself
    limit: int              # tokens that were looked up
    tokens: int             # local ones and those that can be loaded
    cpu_tokens: int         # leading tokens that are in the cpu tier in all groups
    near_tokens: int        # and those that this node has at all; the rest is elsewhere
    leases: list[int]       # one a group, 0 where there is none
    time: float


class Request:
    __slots__ = ("engine", "id", "chains", "offer", "load", "no_load", "in_flight", "epoch",
                 "puts", "finished", "delayed", "open_steps", "final", "next_put", "settled",
                 "short_puts", "counted", "sources")

    def __init__(self, engine: Any, chains: list[Chain]) -> None:
        self.engine = engine            # vLLM's Request
        self.id: str = engine.request_id
        self.chains = chains
        self.offer: Offer | None = None
        self.load: Load | None = None
        self.no_load = False            # a load failed: compute, whatever is found
        self.in_flight = 0              # tokens in steps whose output has not come back
        self.epoch = 0                  # raised when the engine takes all blocks away
        self.puts: dict[int, Put] = {}  # those for which the request must keep its blocks
        self.finished = False
        self.delayed = False            # finished, and the engine keeps the blocks for us
        self.open_steps = 0             # steps under way that fill blocks
        self.final: tuple[list[int], ...] | None = None     # block tables, to store from at the end
        self.next_put = 0               # tokens from which there is a new block to store
        self.settled = 0                # computed tokens when the last step came back
        self.short_puts = 0
        self.counted = False            # in the hit statistics
        self.sources = (0, 0, 0)        # tokens of the last load from cpu, SSD and elsewhere

    def extend_keys(self) -> None:
        hashes = self.engine.block_hashes
        for chain in self.chains:
            chain.extend(hashes)

    def computed(self) -> int:
        """Tokens whose KV is in place, and is that of the request's own tokens: neither steps
        under way nor draft tokens that were turned down are in it."""
        return max(self.engine.num_computed_tokens - self.in_flight, 0)

    @property
    def idle(self) -> bool:
        """Nothing is under way that needs the request's blocks."""
        return not self.puts and not self.open_steps and self.final is None


@dataclass(slots=True, eq=False)
class Put:
    op: int
    request: Request
    chain: Chain
    first: int
    pages: list[int]
    epoch: int
    preemptions: int            # of the request when it began
    held: list[Any] | None      # engine blocks kept from reuse; None: the request keeps them


@dataclass(slots=True)
class Part:
    """One group's share of a load."""
    chain: Chain
    lease: int
    first: int
    pages: list[int]


@dataclass(slots=True, eq=False)
class Load:
    request: Request
    end: int                                                # tokens
    sync: bool
    time: float
    waiting: list[Part]                                     # not started yet
    after: int = 0                                          # step that must have come back before
    blocked: set[int] = field(default_factory=set)          # puts that must end before
    launched: float = 0.0
    blocks: int = 0                                         # of all parts
    parts: dict[int, Part] = field(default_factory=dict)    # under way, by operation
    ops: list[int] = field(default_factory=list)            # all that were started
    bad: list[int] = field(default_factory=list)            # pages without their bytes
    failed: bool = False
    spoiled: bool = False                                   # its bytes are old, whatever comes
    busy: bool = False                                      # somebody may still write its pages
    early: bool = False                                     # reported while it was on its way
    ended: bool = False
    reported: bool = False                                  # handed to the workers as failed
    told: bool = False              # a step computes on it as it comes: workers see how it ends
