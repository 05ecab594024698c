"""Engines that move KV without a pause, while daemon, schedulers and workers are killed with -9 or stopped at random:
no operation and no call takes longer than its deadline, no byte that is delivered as good is wrong, no page is written
to after its operation is over, everybody finds each other again, and in the end nothing is left.

    CHAOS_SEED=n      the same faults again (what the processes are doing then differs)
    CHAOS_ROUNDS=n    how many times (50)

The processes are in tests/chaos. The library is FLEXKV_LIB, or src/libflexkv.so beside the program.
"""
import ctypes
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest

from daemon_rig import BIN, DEADLINE, ROOT, place, start, stopped, wait_until  # noqa: F401

LIB = os.environ.get("FLEXKV_LIB", str(Path(BIN).parent / "src" / "libflexkv.so"))
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "50"))
SEED = int(os.environ.get("CHAOS_SEED", "0")) or random.randrange(1, 1 << 30)
REST_EVERY = 10         # rounds
LOG_LINES = 40          # of each process, when something is wrong

pytestmark = pytest.mark.skipif(not Path(LIB).exists(), reason=f"{LIB} is not built")


@pytest.fixture
def modules(monkeypatch):
    """Those of tests/chaos can be imported; they need to know the library."""
    monkeypatch.setenv("FLEXKV_LIB", LIB)
    monkeypatch.setenv("FLEXKV_SERVER_TIMEOUT_MS", "500")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "chaos"))


def tell(world, error):
    logs = []
    for path in sorted(world.place.glob("*.log")):
        logs.append(f"---- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:]))
    pytest.fail(f"CHAOS_SEED={SEED}: {error}\n\nwhat happened last: {world.done[-20:]}\n\n" + "\n".join(logs),
                pytrace=False)


def test_chaos(modules):
    import world as world_class
    print(f"CHAOS_SEED={SEED}")
    with tempfile.TemporaryDirectory(prefix="fkc-", ignore_cleanup_errors=True) as folder:
        world = world_class.World(Path(folder), BIN, LIB, SEED)
        try:
            world.recovered(within=world_class.START)
            for n in range(1, ROUNDS + 1):
                world.round()
                if n % REST_EVERY == 0:
                    world.rest()
                    if n % (2 * REST_EVERY) == 0:
                        world.reset()
                    world.resume()
            world.leave()
            end = time.monotonic() + 10
            while world.left_over() and time.monotonic() < end:
                time.sleep(0.05)
            assert not world.left_over()
        except world_class.Broken as e:
            tell(world, e)
        finally:
            world.close()
        counts = {engine.name: {k: v for k, v in engine.counts().items() if v} for engine in world.engines}
    print(counts, file=sys.stderr)
    for name, count in counts.items():
        assert count["puts_ok"] > ROUNDS and count["gets_ok"] > ROUNDS, (name, count)


# ---- what it has found, and what is too slow for it to find ----

class Client:
    """An engine in this process: its scheduler's node, and agents of its workers."""

    PAGE, PAGES, TOKENS = 65536, 32, 4

    def __init__(self, address, workers=2):
        import api
        self.api, self.address = api, address
        self.memory = [ctypes.create_string_buffer(self.PAGE * self.PAGES) for _ in range(workers)]
        self.agents = [self.agent(w) for w in range(workers)]
        self.node = api.Node(address, listen=False)
        self.open()

    def agent(self, worker):
        return self.api.Agent(self.address, "model", "here", worker,
                              [(ctypes.addressof(self.memory[worker]), self.PAGE, self.PAGE, self.PAGES)])

    def open(self, wait_ms=10000):
        self.node.open("model", "here", len(self.memory), self.TOKENS, wait_ms)

    def keys(self, seed, blocks=4):
        return self.node.keys([seed * 1000 + i for i in range(blocks * self.TOKENS)])

    def put(self, seed, blocks=4):
        return self.node.put(self.keys(seed, blocks), 0, list(range(blocks)), 0)

    def write(self, byte):
        for memory in self.memory:
            ctypes.memset(memory, byte, len(memory))

    def ended(self, op, within):
        end = time.monotonic() + within
        while time.monotonic() < end:
            for done in self.node.poll(100):
                assert done.op == op
                return done
        pytest.fail(f"the operation is not over after {within} s")

    def close(self):
        for agent in self.agents:
            agent.close()
        self.node.close()


@pytest.fixture
def client(modules, start):                                                             # noqa: F811
    """And the daemon it uses."""
    daemon = start("--set", "cpu_cache_gb=4M").ready()
    it = Client(daemon.address)
    it.daemon = daemon
    yield it
    if it.node is not None:
        it.close()


def test_operation_ends_though_its_daemon_stands_still(client):
    """And nobody asks it anything else."""
    with stopped(client.daemon.process):
        done = client.ended(client.put(1), within=8)
        assert done.status < 0 and done.flags & client.api.PAGES_BUSY
    wait_until(lambda: client.node.match(client.keys(1)).blocks == 0 and not client.node.poll(0))

    def stored():
        try:
            return client.ended(client.put(2), DEADLINE).status == 0
        except client.api.Failed:
            return False
    wait_until(stored, message="puts are not taken again")


def test_close_does_not_wait_for_workers(client, start):                                # noqa: F811
    """The daemon has come back, the workers have not: the node waits for them to open its space again."""
    client.agents.pop().close()
    client.daemon.process.kill()
    client.daemon.wait()
    start().ready()
    time.sleep(1.5)
    begin = time.monotonic()
    client.close()
    client.node = None
    assert time.monotonic() - begin < 2


def test_a_second_open_in_vain_leaves_the_first_alone(client):
    assert client.ended(client.put(1), DEADLINE).status == 0
    client.agents.pop().close()
    wait_until(lambda: client.daemon.status()["instances"][0]["registered"] == 1)
    with pytest.raises(client.api.Failed, match="1 of 2 workers"):
        client.open(wait_ms=300)
    client.agents.append(client.agent(1))
    wait_until(lambda: client.node.match(client.keys(1)).blocks == 4, message="the space is not what it was")
    assert client.ended(client.put(2), DEADLINE).status == 0


def test_compute_rate_outlives_the_daemon(client, start):                               # noqa: F811
    """Told while there is none, it is known to the next one."""
    client.daemon.process.kill()
    client.daemon.wait()
    wait_until(lambda: client.node.match(client.keys(1)).blocks == 0)
    client.node.set_compute_rate(1e5)
    second = start().ready()
    wait_until(lambda: [s["compute_us_per_block"] for s in second.status()["spaces"]] == [pytest.approx(40)],
               message="the daemon was not told what computing costs")


def test_put_of_a_client_that_gave_up_is_not_stored(modules, start):                    # noqa: F811
    """It lies in the socket of a daemon that stands still. When the daemon goes on, and the put with it, the pages have
    had another use for long."""
    daemon = start("--set", "cpu_cache_gb=32M").ready()
    client, blocks = Client(daemon.address, workers=1), 16
    try:
        for seed in range(3):
            client.write(1)
            keys = client.keys(seed, blocks)
            with stopped(daemon.process):
                ops = {client.put(seed, blocks), *(client.node.prefetch(keys) for _ in range(20))}
                wait_until(lambda: not ops.difference_update(done.op for done in client.node.poll(100)) and not ops)
                client.write(2)
            wait_until(lambda: client_is_back(client))
            time.sleep(0.1)
            found = client.node.match(keys)
            if found.blocks:
                op = client.node.get(found.lease, 0, list(range(blocks, blocks + found.blocks)), 0)
                assert client.ended(op, DEADLINE).status == 0
                assert client.memory[0].raw[blocks * client.PAGE] == 1, "bytes of the pages' next use were stored"
    finally:
        client.close()


def client_is_back(client):
    try:
        return client.node.status()
    except client.api.Failed:
        return False
