"""Real engines whose nodes are one cluster, each in a network namespace of its own where that can be had: what one has computed the
others load, with the same tokens, as much as a single node with everything would; tenants stay apart; events keep their rules; a node
that dies takes nothing but its blocks away."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "multi_node"))

from cluster import BLOCK, Answer, Cluster, Options, flexkv     # noqa: E402
from demo import Prompt, differences, fetched, play, prompts, warm_up   # noqa: E402
from processes import marked    # noqa: E402

NO_REDIS = shutil.which("redis-server") is None and "there is no redis-server here (tools/install-deps --cluster)"
pytestmark = pytest.mark.skipif(bool(NO_REDIS), reason=str(NO_REDIS))


def can_have_networks() -> bool:
    """Root alone is not enough, as in containers; ip -n wants a file system of its own at /, which a chroot has not."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        return False
    name = f"flexkv-try-{os.getpid()}"
    made = all(subprocess.run(words, capture_output=True).returncode == 0 for words in
               (["ip", "netns", "add", name], ["ip", "-n", name, "link", "set", "lo", "up"]))
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout if shutil.which("ip") else ""


class Events:
    """A reader of an engine's stream of KV events, that knows their rules."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        node = cluster.nodes[number]
        self.out = cluster.folder / f"events{number}.jsonl"
        words = [*node.prefix(), flexkv(), "events", f"tcp://{node.ip}:{node.event_port}", "--json"]
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, cwd=cluster.folder,
                                            env=cluster.environment({}))

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20), self.out.read_text()


def big_node(a: Answer) -> int:
    """What a node that has everything reuses of a prompt: all whole blocks, but that one token has to be computed."""
    return (a.prompt - 1) // BLOCK * BLOCK


def check(work: list[Prompt], cluster: Cluster) -> None:
    together, alone = play(cluster, work)
    assert differences(work, together, alone) == []
    for answers in together.again:
        for a in answers:
            assert a.cached == big_node(a), f"{a.cached} of {a.prompt} tokens were reused"
    if cluster.alone:
        assert abs(together.ratio() - alone.ratio()) <= 0.01


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="flexkv-t."))
    before = namespaces()
    try:
        with Cluster(folder, Options(network=can_have_networks(), events=True)) as c:
            warm_up(c)
            yield c
        assert not marked(folder), "processes are left"
        assert namespaces() == before, "namespaces are left"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_one_computed_the_other_loads(cluster: Cluster) -> None:
    events = Events(cluster, 1)
    blocks = fetched(cluster)[0]
    work = prompts(2, 4, 1000, [""])
    check(work, cluster)
    assert fetched(cluster)[0] - blocks >= 4 * (1000 // BLOCK // 2)
    time.sleep(1)       # what is said when a request has ended comes with the engine's next step
    cluster.nodes[1].complete(work[0].tokens[:100], 2)
    status, text = events.end()
    assert status == 0, text[-3000:]
    assert '"CPU"' in text or '"cpu"' in text, text[-3000:]


def test_tenants_stay_apart(cluster: Cluster) -> None:
    """The same prompt with one salt, then at the other node with the same, another, and none."""
    [prompt] = prompts(1, 1, 700, ["tenant-1"], seed=7)
    first, second = cluster.nodes
    said = first.complete(prompt.tokens, 8, cache_salt="tenant-1")
    cluster.settle()
    assert second.complete(prompt.tokens, 8, cache_salt="tenant-2").cached == 0
    assert second.complete(prompt.tokens, 8).cached == 0
    same = second.complete(prompt.tokens, 8, cache_salt="tenant-1")
    assert same.cached == big_node(same) and same.tokens == said.tokens
    check(prompts(2, 4, 700, ["tenant-3", "tenant-4"], seed=8), cluster)


def test_a_node_that_dies(cluster: Cluster) -> None:
    """kill -9 of a daemon: the others answer, with the same tokens; and it is a member again when it is back."""
    first, second = cluster.nodes
    work = prompts(1, 3, 700, [""], seed=9)
    said = [first.complete(p.tokens, 8).tokens for p in work]
    cluster.settle()
    assert first.daemon is not None
    first.daemon.process.kill()
    first.daemon.process.wait(20)
    cluster.children.remove(first.daemon)
    for p, tokens in zip(work, said):
        assert second.complete(p.tokens, 8).tokens == tokens
        assert first.complete(p.tokens, 8).tokens == tokens
    cluster.start_daemon(first)
    cluster.wait("its return", 60, cluster.met)
    assert [first.complete(p.tokens, 8).tokens for p in work] == said
    deadline = time.monotonic() + 60
    new = prompts(1, 20, 400, [""], seed=10)
    while True:         # its engine finds the daemon again by itself
        p = new.pop()
        was = second.complete(p.tokens, 8)
        cluster.settle()
        again = first.complete(p.tokens, 8)
        assert again.tokens == was.tokens
        if again.cached == big_node(again):
            break
        assert time.monotonic() < deadline and new, json.dumps(first.status())


def test_four_nodes_and_one_alone() -> None:
    """With Mooncake's wire between them, and SSD tiers."""
    folder = Path(tempfile.mkdtemp(prefix="flexkv-t."))
    try:
        options = Options(nodes=4, network=can_have_networks(), alone=True, transport="mooncake", ssd_cache="512M",
                          rate="1gbit")
        with Cluster(folder, options) as c:
            warm_up(c)
            check(prompts(4, 8, 1500, [""]), c)
            assert fetched(c)[0] > 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
