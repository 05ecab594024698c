"""Nodes that share their blocks, as processes with a real Redis, under load: nodes killed, stopped, started again under the
same name, Redis killed, stopped, emptied, at random. No byte that is delivered is wrong, nothing takes longer than its
deadline, who dies is forgotten, and in the end all find each other again.

    SHARING_SEED=n      the same faults again (what the processes are doing then differs)
    SHARING_ROUNDS=n    how many (10)
"""
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from daemon_rig import BIN, DEADLINE, clean_env, stop, stopped, wait_until, world  # noqa: F401
from test_cluster import SERVER, Redis

NODE = Path(os.environ.get("FLEXKV_BUILD", Path(BIN).parent)) / "tests" / "cluster" / "share_node"
ROUNDS = int(os.environ.get("SHARING_ROUNDS", "10"))
SEED = int(os.environ.get("SHARING_SEED", "0")) or random.randrange(1, 1 << 30)
TTL = 2                 # seconds; the least that an operation may take of them is the processes' own
CHAINS = 40

pytestmark = pytest.mark.skipif(not Path(SERVER).exists() or not NODE.exists(),
                                reason="needs redis-server (tools/install-deps --test) and the built tests")


class Node:
    def __init__(self, place, redis, name, *more, blocks=300, prefix=()):
        self.name = name
        self.log_path = place / f"{name}.log"
        options = [f"redis_host={redis.path}", f"node_name={name}", f"node_ttl_seconds={TTL}", "enable_p2p_cpu=1",
                   "peer_timeout_ms=1000", "redis_timeout_ms=500", "log_level=WARNING", *more]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen([*prefix, NODE, str(random.randrange(1 << 30)), str(CHAINS), str(blocks), *options],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                            env=clean_env(), cwd=place)
        self.stopped = False
        assert self.process.stdout.readline() == "ready\n", self.log()

    def ask(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            pytest.fail(f"{self.name} has ended with {self.process.wait(DEADLINE)}: {self.log()}")
        return answer.rstrip("\n")

    def stats(self):
        return {k: int(v) for k, v in (x.split("=") for x in self.ask("stats").split())}

    def status(self):
        return json.loads(self.ask("status"))["cluster"]

    def alive_peers(self):
        return {p["name"] for p in self.status()["peers"] if p["alive"]}

    def log(self):
        return self.log_path.read_text(errors="replace")[-3000:]

    def freeze(self):
        stop(self.process)
        self.stopped = True

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)
        self.stopped = False

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def quit(self):
        self.process.stdin.close()
        assert self.process.wait(DEADLINE) == 0, self.log()


def know_each_other(nodes):
    names = {n.name for n in nodes}
    for n in nodes:
        wait_until(lambda: n.alive_peers() == names - {n.name} and all(p["synced"] for p in n.status()["peers"]),
                   message=lambda: f"{n.name} knows {n.alive_peers()}, not all of {names}: {n.log()}")


def go_on(nodes):
    """Each of them ends operations, and none with a wrong byte: else it has ended itself."""
    before = {n.name: n.stats() for n in nodes}
    for n in nodes:
        wait_until(lambda: n.stats()["gets"] > before[n.name]["gets"], message=lambda: f"{n.name} stands still: {n.log()}")


class Faults:
    """Each leaves a world in which everybody can find everybody again."""

    def __init__(self, world, redis, nodes, dice):
        self.world, self.redis, self.nodes, self.dice = world, redis, nodes, dice

    def others(self, *but):
        return [n for n in self.nodes if n not in but]

    def killed(self):
        i = self.dice.randrange(len(self.nodes))
        self.nodes[i].kill()
        go_on(self.others(self.nodes[i]))
        self.nodes[i] = self.world(Node, self.redis, self.nodes[i].name)

    def killed_for_longer(self):
        i = self.dice.randrange(len(self.nodes))
        self.nodes[i].kill()
        died = time.monotonic()
        rest = self.others(self.nodes[i])
        for n in rest:
            wait_until(lambda: self.nodes[i].name not in n.alive_peers(), message="a dead node is still a member")
        took = time.monotonic() - died
        assert took < TTL + 1 + 2, took         # and what asking three busy processes takes
        go_on(rest)
        self.nodes[i] = self.world(Node, self.redis, self.nodes[i].name)

    def frozen(self):
        node = self.dice.choice(self.nodes)
        node.freeze()
        go_on(self.others(node))
        time.sleep(self.dice.uniform(0, 1.5 * TTL))
        node.thaw()

    def redis_killed(self):
        self.redis.kill()
        go_on(self.nodes)
        self.redis.start()

    def redis_frozen(self):
        with stopped(self.redis.process):
            go_on(self.nodes)
            time.sleep(self.dice.uniform(0, TTL))

    def redis_flushed(self):
        self.redis.ask("FLUSHALL")
        go_on(self.nodes)

    def one_more(self):
        if len(self.nodes) < 5:
            self.nodes.append(self.world(Node, self.redis, f"more{self.dice.randrange(1 << 20)}"))
        else:
            self.nodes.pop().quit()


def test_faults_under_load(world):
    dice = random.Random(SEED)
    redis = world(Redis)
    nodes = [world(Node, redis, name) for name in ("a", "b", "c")]
    faults = Faults(world, redis, nodes, dice)
    kinds = [faults.killed, faults.killed_for_longer, faults.frozen, faults.redis_killed, faults.redis_frozen,
             faults.redis_flushed, faults.one_more]
    done = []
    try:
        know_each_other(nodes)
        for _ in range(ROUNDS):
            fault = dice.choice(kinds)
            done.append(fault.__name__)
            fault()
            go_on(nodes)
        know_each_other(nodes)
        assert sum(n.stats()["fetched"] for n in nodes) > 0
        for n in nodes:
            n.ask("pause")
        nodes[0].ask(f"put {CHAINS + 5} 20")    # and share again
        for n in nodes[1:]:
            wait_until(lambda: n.ask(f"has {CHAINS + 5} 20").split()[0] == "20", message=lambda: f"{n.name}: {n.log()}")
        for n in nodes:
            n.quit()
        nodes.clear()
    finally:
        print(f"SHARING_SEED={SEED}: {done}", [n.stats() for n in nodes if n.process.poll() is None and not n.stopped])


def test_a_node_that_comes_back_is_not_taken_for_its_former_self(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a"), world(Node, redis, "b")
    know_each_other([a, b])
    for n in (a, b):
        n.ask("pause")
    b.ask("put 1000 20")
    wait_until(lambda: a.ask("has 1000 20") == "20 20")
    b.kill()
    b = world(Node, redis, "b")
    b.ask("pause")
    wait_until(lambda: b.status()["epoch"] and
               b.status()["epoch"] in {p["epoch"] for p in a.status()["peers"]}, message=a.log)
    assert a.ask("has 1000 20") == "0 0"
    for n in (a, b):
        n.quit()
    left = [k for k in redis.keys() if not k.endswith((":control", ":epoch"))]
    assert not left, left


def test_what_lies_in_redis_has_a_lifetime_and_an_idle_cluster_costs_little(world):
    redis = world(Redis)
    nodes = [world(Node, redis, name) for name in ("a", "b", "c")]
    know_each_other(nodes)
    for n in nodes:
        n.ask("pause")
    nodes[0].ask("put 1000 24")
    wait_until(lambda: nodes[1].ask("has 1000 24").split()[0] == "24")
    for key in redis.keys():
        assert key.startswith("flexkv:{default}:") and int(redis.ask("PTTL", key)) > 0, key
    time.sleep(0.5)             # what was told before the pause is through

    def written():
        info = redis.ask("INFO", "commandstats")
        return sum(int(line.split("calls=")[1].split(",")[0]) for line in info.splitlines() if "cmdstat_xadd" in line)
    before = written()
    time.sleep(2)
    assert written() == before          # no change, no entry
    for n in nodes:
        n.quit()
