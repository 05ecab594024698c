"""Networks that break between nodes under load, each in a network namespace: cut from one other node, in one direction or
both, from Redis, from everybody. Packets vanish, nothing is refused. Nobody waits longer than his deadline, no byte is wrong, who can't
be heard is forgotten, and everybody finds everybody again.

    SHARING_SEED=n      the same faults again
    PARTITION_ROUNDS=n  how many (6)
"""
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon_rig import ROOT, wait_until, world      # noqa: F401
from test_cluster import SERVER, Redis
from test_sharing import NODE, SEED, TTL, Node, go_on, know_each_other

sys.path.insert(0, str(ROOT / "examples" / "multi_node"))
from cluster import NETWORK, Network, Trouble     # noqa: E402

ROUNDS = int(os.environ.get("PARTITION_ROUNDS", "6"))
REDIS = f"{NETWORK}.1"
PORT = 6379             # nobody else is in there

pytestmark = pytest.mark.skipif(not Path(SERVER).exists() or not NODE.exists() or not shutil.which("nft"),
                                reason="needs redis-server, nft (tools/install-deps --test) and the built tests")


def run(*words, check=True):
    return subprocess.run(words, check=check, capture_output=True, text=True, timeout=30)


@pytest.fixture
def net(tmp_path):
    """Or a reason why there can be none: rights, or a kernel without nftables."""
    try:
        net = Network(tmp_path, 3, "1gbit")
        try:
            net.up()
            for name in net.nodes:
                run("ip", "netns", "exec", name, "nft", "add table inet cut; "
                    "add chain inet cut in { type filter hook input priority 0; }; "
                    "add chain inet cut out { type filter hook output priority 0; }")
            yield net
        except (Trouble, subprocess.CalledProcessError) as e:
            pytest.skip(f"no network namespaces with nftables here: {e}")
        finally:
            Network.down(tmp_path)
    except Trouble as e:
        pytest.skip(str(e))


class NetRedis(Redis):
    """Reached by address from the nodes, and by its socket from here."""

    def __init__(self, place, net):                                                       # noqa: F811
        self.net = net
        super().__init__(place, "--bind", REDIS, "--protected-mode", "no", port=PORT)

    def start(self):
        Path(self.path).unlink(missing_ok=True)
        with open(self.place / "redis.log", "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.net.hub, SERVER, "--port", str(PORT), "--unixsocket", self.path, "--save", "",
                 "--dir", str(self.place), *self.args], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.wait()


class Line:
    """What a node hears and says. Of its rules none stays."""

    def __init__(self, net, number):                                                      # noqa: F811
        self.name, self.ip = net.nodes[number], f"{NETWORK}.{10 + number}"

    def nft(self, text):
        run("ip", "netns", "exec", self.name, "nft", text)

    def deaf(self, ip):
        self.nft(f"add rule inet cut in ip saddr {ip} drop")

    def dumb(self, ip):
        self.nft(f"add rule inet cut out ip daddr {ip} drop")

    def isolate(self):
        self.nft("add rule inet cut in iifname != lo drop; add rule inet cut out oifname != lo drop")

    def heal(self):
        self.nft("flush table inet cut")


def forgotten(nodes, node):
    """By all others, within the TTL, a second, and what asking busy processes takes."""
    began = time.monotonic()
    for n in nodes:
        if n is not node:
            wait_until(lambda: node.name not in n.alive_peers(), message="a node that can't be heard is still a member")
    assert time.monotonic() - began < TTL + 1 + 2


def test_networks_that_break(world, net):                                                 # noqa: F811
    dice = random.Random(SEED)
    redis = world(NetRedis, net)
    lines = [Line(net, i) for i in range(3)]
    nodes = [world(Node, redis, f"n{i}", f"redis_host={REDIS}", f"redis_port={PORT}", f"local_ip={line.ip}",
                   "cluster_secret=a secret of the tests", prefix=("ip", "netns", "exec", line.name))
             for i, line in enumerate(lines)]
    done = []

    def pair(i, j, one_way):
        lines[i].deaf(lines[j].ip)
        if not one_way:
            lines[i].dumb(lines[j].ip)

    def from_redis(i, _):
        lines[i].deaf(REDIS)
        lines[i].dumb(REDIS)
        forgotten(nodes, nodes[i])

    def from_all(i, _):
        lines[i].isolate()
        forgotten(nodes, nodes[i])

    kinds = {"pair": lambda i, j: pair(i, j, False), "one way": lambda i, j: pair(i, j, True), "redis": from_redis,
             "all": from_all}
    try:
        know_each_other(nodes)
        go_on(nodes)
        for round_ in range(ROUNDS):
            kind = list(kinds)[round_ % len(kinds)]
            i, j = dice.sample(range(3), 2)
            done.append((kind, i, j))
            kinds[kind](i, j)
            go_on(nodes)
            time.sleep(dice.uniform(0, TTL))
            go_on(nodes)
            for line in lines:
                line.heal()
            know_each_other(nodes)
        for n in nodes:
            n.ask("pause")
        nodes[0].ask("put 1000 20")     # all share again
        for n in nodes[1:]:
            wait_until(lambda: n.ask("has 1000 20").split()[0] == "20", message=lambda: f"{n.name}: {n.log()}")
        assert sum(n.stats()["fetched"] for n in nodes) > 0
        for n in nodes:
            n.quit()
        nodes.clear()
    finally:
        print(f"SHARING_SEED={SEED}: {done}")
