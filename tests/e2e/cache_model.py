"""An independent model of a one-tier prefix cache with lru or fifo, to compare `flexkv replay` with.

Written from the rules, not from the C code:

- A block is an id of the trace (or a part of one) with its whole prefix; its parent is the block before it.
- A request is looked up: its leading blocks that are cached are hits. They are used, all at one moment.
- Then its other blocks are stored, all at one later moment. Every use and every store has a moment of its own, so two
  blocks of different calls never tie, and of one call at most one block is a leaf at a time.
- To store n blocks, n places are needed. While there are too few free ones, the block with the oldest moment
  (lru: of last use or storing; fifo: of storing) is evicted among the leaves: blocks no cached block has as parent.
- The last hit of the request being stored is not evicted, hence none of its ancestors is.
- If that does not make enough room, the leading ones of the new blocks are stored, as many as there is room for.
"""
import gzip
import heapq
import json


def load_trace(path, limit=None):
    """The hash_ids of each request."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt") as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    return requests[:limit]


def unique_ids(requests):
    return len({i for ids in requests for i in ids})


class Cache:
    def __init__(self, capacity, policy):
        assert policy in ("lru", "fifo")
        self.capacity = capacity
        self.lru = policy == "lru"
        self.moment = 0
        self.age = {}           # cached block -> moment that the policy looks at
        self.parent = {}        # cached block -> its parent or None
        self.children = {}      # cached block -> how many cached blocks have it as parent
        self.leaves = []        # heap of (moment, block); entries may be out of date
        self.evicted = 0

    def request(self, blocks):
        """Looks up, then stores. Returns how many leading blocks were hits."""
        hits = 0
        for block in blocks:
            if block not in self.age:
                break
            hits += 1
        if hits:
            self.use(blocks[:hits])
        if hits < len(blocks):
            self.store(blocks, hits)
        return hits

    def use(self, blocks):
        self.moment += 1
        if self.lru:
            for block in blocks:
                self.age[block] = self.moment
            self.note_leaf(blocks[-1])

    def note_leaf(self, block):
        if not self.children[block]:
            heapq.heappush(self.leaves, (self.age[block], block))

    def store(self, blocks, first):
        self.moment += 1
        parent = blocks[first - 1] if first else None
        room = self.make_room(len(blocks) - first, parent)
        new = blocks[first:first + room]
        for block in new:
            self.age[block] = self.moment
            self.parent[block] = parent
            self.children[block] = 0
            if parent is not None:
                self.children[parent] += 1
            parent = block
        if new:
            self.note_leaf(new[-1])

    def make_room(self, wanted, keep):
        kept = None
        while self.capacity - len(self.age) < wanted and self.leaves:
            moment, block = heapq.heappop(self.leaves)
            if self.age.get(block) != moment or self.children[block]:
                continue        # out of date
            if block == keep:
                kept = (moment, block)
                continue
            self.evict(block)
        if kept:
            heapq.heappush(self.leaves, kept)
        return min(wanted, self.capacity - len(self.age))

    def evict(self, block):
        parent = self.parent.pop(block)
        del self.age[block], self.children[block]
        self.evicted += 1
        if parent is not None:
            self.children[parent] -= 1
            self.note_leaf(parent)


def simulate(requests, capacity, policy, parts=1):
    """(hit blocks, blocks, evicted blocks) of the trace; each id is split into `parts` blocks."""
    cache = Cache(capacity, policy)
    hits = total = 0
    for ids in requests:
        blocks = ids if parts == 1 else [i * parts + k for i in ids for k in range(parts)]
        hits += cache.request(blocks)
        total += len(blocks)
    return hits, total, cache.evicted
