"""A process of an engine that moves KV without a pause, for the chaos test. It dies with its parent.

    engine.py worker    FILE ADDRESS INSTANCE WORKER
    engine.py scheduler FILE ADDRESS INSTANCE client|embedded SEED

FILE: the engine's memory (memory.py). What the scheduler finds wrong goes to FILE.report, one line each; in the phase
REST it writes the node's status to FILE.status when nothing is under way any more.
"""
import ctypes
import errno
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from api import GET, KEY_BYTES, PAGES_BUSY, PREFETCH, PUT, Agent, Failed, Node
from memory import LEAVE, OPS_MAX, PAGES, REST, RUN, WORKERS, Memory

TOKENS = 8                  # of a block
CHAINS, CHAIN_BLOCKS = 48, 12
OPS = 8                     # at a time
SLACK = 6.0                 # seconds, for a machine that does other things too
PR_SET_PDEATHSIG = 1


def seconds(name: str) -> float:
    return int(os.environ[name]) / 1000


# What may pass until a call returns, and until an operation is over: its own deadline, the grace that a copy has to
# stop, the time it takes to see that the daemon does not answer.
CALL_LIMIT = seconds("FLEXKV_SERVER_TIMEOUT_MS") + SLACK
OP_LIMIT = seconds("FLEXKV_OP_TIMEOUT_MS") + 1.0 + 2 * seconds("FLEXKV_SERVER_TIMEOUT_MS") + SLACK


def worker(file: str, address: str, instance: str, number: str) -> None:
    """Revokes what the scheduler asks for. What an earlier process of this worker was asked is done: it is dead."""
    memory, me = Memory(Path(file)), int(number)
    memory[f"revoke_done_{me}"] = memory["revoke_asked"]
    agent = Agent(address, "model", instance, me, memory.regions(me))
    while True:
        asked = memory["revoke_asked"]
        if asked != memory[f"revoke_done_{me}"] and agent.revoke(memory.read_ops(), 2000):
            memory[f"revoke_done_{me}"] = asked
        memory[f"state_{me}"] = agent.state()
        time.sleep(0.003)


@dataclass
class Op:
    kind: int
    keys: bytes             # of its blocks
    pages: list[int]
    limit: float


@dataclass
class Lease:
    number: int
    keys: bytes             # of its blocks
    when: float             # to be used, or released


class Scheduler:
    def __init__(self, file: str, address: str, instance: str, mode: str, seed: str) -> None:
        self.memory = Memory(Path(file))
        self.report_path, self.status_path = Path(file + ".report"), Path(file + ".status")
        self.address, self.instance, self.embedded = address, instance, mode == "embedded"
        self.random = random.Random(seed)
        self.ops: dict[int, Op] = {}
        self.busy: list[tuple[int, list[int]]] = []         # operations to be revoked, and their pages
        self.revoking: list[tuple[int, list[int]]] = []
        self.leases: list[Lease] = []
        self.memory["ops_open"] = 0

    def report(self, kind: str, text: str) -> None:
        self.memory.count(kind)
        with open(self.report_path, "a") as f:
            f.write(f"{self.instance} {kind}: {text}\n")

    # ---- calls with a limit ----

    def call(self, what, *args, limit: float = CALL_LIMIT):
        """A call that takes too long is reported, unless this process stood still meanwhile."""
        pauses, begin = self.memory["pauses"], time.monotonic()
        try:
            return what(*args)
        finally:
            took = time.monotonic() - begin
            if took > limit and pauses == self.memory["pauses"]:
                self.report("late", f"{what.__name__} took {took:.1f} s")

    def connect(self) -> None:
        """Until there is a node, and all workers are registered at it."""
        while True:
            try:
                self.node = self.call(Node, self.address, self.embedded)
                break
            except Failed as e:
                if e.errno == errno.EINVAL:
                    raise
                self.wait()
        while True:
            try:
                self.call(self.node.open, "model", self.instance, WORKERS, TOKENS, 1000, limit=1 + CALL_LIMIT)
                break
            except Failed as e:
                if e.errno == errno.EINVAL:
                    raise
                self.wait()
        # Those of an earlier scheduler's operations are over: its agents have come here.
        for page in range(PAGES):
            self.memory.free(page)
        self.free_pages = list(range(PAGES))
        self.chains = [self.node.keys(self.tokens(chain)) for chain in range(CHAINS)]

    @staticmethod
    def tokens(chain: int) -> list[int]:
        """Four chains each begin alike."""
        shared = [chain // 4 * 1000 + i for i in range(CHAIN_BLOCKS // 3 * TOKENS)]
        return shared + [1000000 + chain * 1000 + i for i in range(CHAIN_BLOCKS * TOKENS - len(shared))]

    def wait(self) -> None:
        self.memory.count("heartbeat")
        if self.memory["phase"] == LEAVE:
            sys.exit(0)
        time.sleep(0.02)

    # ---- pages ----

    def take_pages(self, n: int) -> list[int]:
        """In no order; None of them may have changed since it became free."""
        pages = self.random.sample(self.free_pages, n)
        for page in pages:
            self.free_pages.remove(page)
            if not self.memory.untouched(page):
                self.report("wrong", f"page {page} was free and was written to: {self.memory.describe(page)}")
        return pages

    def give_pages(self, pages: list[int]) -> None:
        for page in pages:
            self.memory.free(page)
        self.free_pages += pages

    def revoke(self) -> None:
        """Pages of which nobody knows whether they are still copied: free when both workers have said so."""
        memory = self.memory
        asked = memory["revoke_asked"]
        if self.revoking and all(memory[f"revoke_done_{w}"] == asked for w in range(WORKERS)):
            for _, pages in self.revoking:
                self.give_pages(pages)
            self.revoking = []
        if self.busy and not self.revoking:
            self.revoking, self.busy = self.busy[:OPS_MAX], self.busy[OPS_MAX:]
            memory.write_ops([op for op, _ in self.revoking])
            memory["revoke_asked"] = asked + 1

    # ---- operations ----

    def start(self, kind: int, keys: bytes, pages: list[int], call, *args) -> None:
        try:
            op = self.call(call, *args)
        except Failed as e:
            if e.errno not in (errno.ENOTCONN, errno.ENOENT):
                self.report("wrong", f"operation {kind}: {e}")
            self.memory.count("refused")
            self.give_pages(pages)
            return
        self.ops[op] = Op(kind, keys, pages, time.monotonic() + OP_LIMIT)

    def put(self) -> None:
        keys = self.random.choice(self.chains)[:self.random.randint(1, CHAIN_BLOCKS) * KEY_BYTES]
        pages = self.take_pages(len(keys) // KEY_BYTES)
        for i, page in enumerate(pages):
            self.memory.fill(page, keys[i * KEY_BYTES:(i + 1) * KEY_BYTES])
        self.start(PUT, keys, pages, self.node.put, keys, 0, pages, self.timeout())

    def get(self) -> None:
        keys = self.random.choice(self.chains)[:self.random.randint(1, CHAIN_BLOCKS) * KEY_BYTES]
        try:
            found = self.call(self.node.match, keys)
        except Failed as e:
            self.report("wrong", f"match: {e}")
            return
        if not found.blocks:
            self.memory.count("misses")
            return
        lease = Lease(found.lease, keys[:found.blocks * KEY_BYTES], time.monotonic() + self.random.random())
        if self.random.random() < 0.3:
            self.leases.append(lease)
        else:
            self.use(lease)

    def use(self, lease: Lease) -> None:
        blocks = len(lease.keys) // KEY_BYTES
        first = self.random.randrange(blocks) if self.random.random() < 0.3 else 0
        n = self.random.randint(1, blocks - first)
        pages = self.take_pages(n)
        self.start(GET, lease.keys[first * KEY_BYTES:(first + n) * KEY_BYTES], pages, self.node.get, lease.number, first,
                   pages, self.timeout())

    def prefetch(self) -> None:
        self.start(PREFETCH, b"", [], self.node.prefetch, self.random.choice(self.chains))

    def cancel(self) -> None:
        if self.ops:
            try:
                self.call(self.node.cancel, self.random.choice(list(self.ops)))
            except Failed:
                pass                            # it has ended, or there is no daemon

    def timeout(self) -> int:
        return self.random.choice((0, 0, 0, 200))

    def use_lease(self) -> None:
        if self.leases:
            self.use(self.leases.pop(self.random.randrange(len(self.leases))))

    def let_leases_go(self, all_of_them: bool = False) -> None:
        now = time.monotonic()
        for lease in self.leases:
            if (all_of_them or lease.when < now) and self.random.random() < 0.7:      # the others run out
                try:
                    self.call(self.node.release, lease.number)
                except Failed:
                    pass
        self.leases = [] if all_of_them else [lease for lease in self.leases if lease.when >= now]

    def poll(self, timeout_ms: int) -> None:
        for done in self.call(self.node.poll, timeout_ms):
            op = self.ops.pop(done.op, None)
            if op is None:
                self.report("wrong", f"completion of operation {done.op:#x}, which nobody waits for")
                continue
            self.ended(done, op)

    def ended(self, done, op: Op) -> None:
        memory = self.memory
        n = len(op.pages)
        good = n if done.status == 0 else done.blocks_ok
        if op.kind != PREFETCH and (done.blocks != n or good > n or (done.status == 0 and done.blocks_ok != n)):
            self.report("wrong", f"kind {op.kind} of {n} blocks ends with status {done.status}, {done.blocks_ok} of "
                        f"{done.blocks} blocks")
        if op.kind == GET:
            for i, page in enumerate(op.pages[:good]):
                if not memory.holds(page, op.keys[i * KEY_BYTES:(i + 1) * KEY_BYTES]):
                    self.report("wrong", f"get {done.op:#x}, status {done.status}: block {i} of {good} on page {page} has "
                                f"other bytes: {memory.describe(page)}")
            memory.count("blocks_ok", good)
        if done.status == 0:
            memory.count({GET: "gets_ok", PUT: "puts_ok"}.get(op.kind, "heartbeat"))
        else:
            memory.count("failed")
        memory.count("busy", done.flags & PAGES_BUSY)
        if done.flags & PAGES_BUSY and op.kind == GET:
            self.busy.append((done.op, op.pages))
        else:                   # what is still read for a put must never be seen by anybody
            self.give_pages(op.pages)

    def look_for_late_ones(self, pauses: int) -> None:
        """An operation must end by itself, whatever has become of the others; our own standstill does not count."""
        now = time.monotonic()
        if pauses != self.memory["pauses"]:
            for op in self.ops.values():
                op.limit = now + OP_LIMIT
            return
        for number, op in self.ops.items():
            if now > op.limit:
                self.report("late", f"operation {number:#x} of kind {op.kind} is not over after {OP_LIMIT:.1f} s")
                op.limit = float("inf")

    # ---- the loop ----

    def turn(self) -> None:
        calm = self.random.random() < 0.02      # nothing but waiting, as an engine with one request does
        end = time.monotonic() + (self.random.random() * 2 if calm else 0)
        while True:
            pauses = self.memory["pauses"]
            self.memory.count("heartbeat")
            self.revoke()
            self.poll(self.random.choice((0, 1, 20)))
            self.memory["ops_open"] = len(self.ops)
            self.look_for_late_ones(pauses)
            if time.monotonic() >= end or self.memory["phase"] != RUN:
                break
        self.let_leases_go()
        for _ in range(self.random.choice((1, 1, 1, OPS))):         # many at once, now and then
            if len(self.ops) < OPS and len(self.free_pages) >= CHAIN_BLOCKS:
                self.random.choices((self.put, self.get, self.use_lease, self.prefetch, self.cancel), (4, 6, 3, 1, 1))[0]()

    def drain(self) -> None:
        end = time.monotonic() + OP_LIMIT + SLACK
        self.let_leases_go(all_of_them=True)
        while self.ops or self.busy or self.revoking:
            pauses = self.memory["pauses"]
            self.revoke()
            self.poll(20)
            self.memory["ops_open"] = len(self.ops)
            self.memory.count("heartbeat")
            self.look_for_late_ones(pauses)
            if pauses != self.memory["pauses"]:
                end = time.monotonic() + OP_LIMIT + SLACK
            if time.monotonic() > end:
                self.report("late", f"{len(self.ops)} operations and {len(self.busy + self.revoking)} revocations are "
                            "not over")
                return

    def rest(self) -> None:
        """Nothing under way. An embedded node is seen by its status only; all slots come back with a reset."""
        self.drain()
        while self.memory["phase"] == REST:
            self.memory.count("heartbeat")
            self.poll(50)
            if self.embedded:
                self.publish(self.node.status())

    def publish(self, text: str) -> None:
        new = self.status_path.with_suffix(".new")
        new.write_text(text)
        new.rename(self.status_path)

    def ask_for_status(self) -> None:
        """A thread of its own: answers must find those who wait for them."""
        while self.memory["phase"] != LEAVE:
            try:
                self.node.status()
            except Failed:
                pass
            time.sleep(0.03)

    def run(self) -> None:
        self.connect()
        asking = threading.Thread(target=self.ask_for_status)
        asking.start()
        while self.memory["phase"] != LEAVE:
            if self.memory["phase"] == REST:
                self.rest()
            else:
                self.turn()
        asking.join()
        self.call(self.node.close, limit=OP_LIMIT)      # with operations under way


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.argv[1] == "worker":
        worker(*sys.argv[2:])
    else:
        Scheduler(*sys.argv[2:]).run()


if __name__ == "__main__":
    main()
