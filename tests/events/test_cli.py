"""`flexkv events` on real streams: what it shows and judges, recordings, and merging with an engine's stream,
judged by Dynamo's indexer."""
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from oracle_rig import BLOCK, ROOT, TENANTS, DaemonEngine, Engine, Indexer, Prompts, compare, dynamo_python, load, load_extension

flexkv = load_extension()
BIN = os.environ.get("FLEXKV_BIN", str(ROOT / "build" / "flexkv"))
DEADLINE = 20
HERE = os.path.dirname(__file__)


class Program:
    """`flexkv events ...` in the background; what it says goes into files, so that it never waits for us."""

    def __init__(self, *args):
        self.files = [tempfile.NamedTemporaryFile("w") for _ in range(2)]
        self.process = subprocess.Popen([BIN, "events", *map(str, args)], stdout=self.files[0], stderr=self.files[1],
                                        stdin=subprocess.DEVNULL,
                                        env={k: v for k, v in os.environ.items() if not k.startswith("FLEXKV_")})

    def said(self):
        """The lines so far."""
        return "".join(line for line in Path(self.files[0].name).read_text().splitlines(True) if line.endswith("\n"))

    def end(self, sig=signal.SIGINT):
        if self.process.poll() is None and sig:
            self.process.send_signal(sig)
        code = self.process.wait(DEADLINE)
        return code, *(Path(f.name).read_text() for f in self.files)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for f in self.files:
            f.close()


class FakeEngine:
    def __init__(self, place, name="engine", replay=True):
        self.endpoint, self.replay = f"ipc://{place}/{name}", f"ipc://{place}/{name}-replay" if replay else "-"
        self.start()

    def start(self):
        self.process = subprocess.Popen([dynamo_python(), f"{HERE}/fake_engine.py", self.endpoint, self.replay],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def send(self, *events, **more):
        self.line({"events": events, **more})

    def line(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "sent\n"

    def stop(self):
        self.process.kill()
        self.process.wait()


def stored(hashes, parent=None, tokens=None, **more):
    tokens = list(range(len(hashes) * BLOCK)) if tokens is None else tokens
    return {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens,
            "block_size": BLOCK, **more}


def removed(hashes, **more):
    return {"type": "BlockRemoved", "block_hashes": hashes, **more}


CLEARED = {"type": "AllBlocksCleared"}


@pytest.fixture
def engine(tmp_path):
    it = Engine(flexkv, kv_events_endpoint=f"ipc://{tmp_path}/node", kv_events_rank=0,
                kv_events_replay_endpoint=f"ipc://{tmp_path}/node-replay")
    yield it
    it.close()


@pytest.fixture
def fake(tmp_path):
    it = FakeEngine(tmp_path)
    yield it
    it.stop()


@pytest.fixture
def indexer(tmp_path):
    it = Indexer(tmp_path)
    yield it
    it.close()


@pytest.fixture
def programs():
    made = []

    def start(*args):
        made.append(Program(*args))
        return made[-1]

    yield start
    for p in made:
        p.close()


def until(what, wanted, message="it is"):
    end = time.monotonic() + DEADLINE
    while (got := what()) != wanted:
        assert time.monotonic() < end, f"{message} {got}, wanted {wanted}"
        time.sleep(0.05)


def blocks_in(lines):
    """Those in host memory, as the events in lines of JSON have it."""
    there = set()
    for event in map(json.loads, lines.splitlines()):
        if event["type"] == "AllBlocksCleared":
            there.clear()
        elif event["medium"] == "CPU":
            (there.update if event["type"] == "BlockStored" else there.difference_update)(event["block_hashes"])
    return there


# ---- showing and judging ----

def test_a_node_breaks_no_rule(engine, programs, tmp_path):
    record = tmp_path / "recording"
    p = programs(engine.options["kv_events_endpoint"], "--replay", engine.options["kv_events_replay_endpoint"], "--json",
                 "--record", record)
    until(lambda: p.said() != "", True, "it has subscribed:")
    load(engine, Prompts(1), 150)
    engine.quiet()
    until(lambda: blocks_in(p.said()), engine.tiers["CPU"], "it shows")
    code, out, err = p.end()
    lines = [json.loads(line) for line in out.splitlines()]
    summary = lines.pop()["summary"]
    assert (code, err, summary["broken"]) == (0, "", {}), out[-2000:]
    assert summary["blocks"] == [{"rank": 0, "device": 0, "host": len(engine.tiers["CPU"]), "disk": 0, "external": 0}]
    assert {x["type"] for x in lines} == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    assert {x.get("cache_salt") for x in lines if x["type"] == "BlockStored"} == {None, "ns1", "ns2"}

    code, again, err = programs("--play", record, "--json").end(None)     # the same, from the file
    assert (code, err, again) == (0, "", out)


def test_each_broken_rule_is_said(fake, programs):
    p = programs(fake.endpoint)
    until(lambda: (fake.send(CLEARED), p.said() != "")[1], True, "it has subscribed:")
    fake.send(stored([1, 2]), stored([1, 2]), removed([9]), stored([5], 4), stored([6], medium="SSD"),
              stored([7], tokens=[1, 2]), stored([8], 8), rank=0)
    fake.send(seq=1000)
    fake.send(seq=1000)
    fake.send(rank=-1)
    fake.send({"type": "BlockMoved"})
    fake.line({"raw": ["", "00", "90"]})
    fake.line({"raw": ["00"]})
    until(lambda: p.said().count("BROKEN frames"), 2, "broken frames:")
    code, out, err = p.end()
    assert (code, err) == (1, "")
    for rule, times in {"twice": 2, "unknown": 1, "orphan": 1, "medium": 1, "tokens": 1, "chain": 1, "gap": 1, "order": 1,
                        "rank": 1, "batch": 1, "frames": 2}.items():
        assert f"rule {rule}: broken {times} times" in out, out[-3000:]


def test_bad_usage_and_bad_files(programs, tmp_path):
    assert programs().end(None)[0] == 2
    assert programs("--merge", "ipc:///x").end(None)[0] == 2
    assert programs("ipc:///x", "--publish", "ipc:///y").end(None)[0] == 2
    code, _, err = programs("nonsense").end(None)
    assert code == 1 and "tcp://" in err
    code, _, err = programs("--play", tmp_path / "none").end(None)
    assert code == 1 and "No such file" in err
    (tmp_path / "other").write_text("something else entirely")
    code, _, err = programs("--play", tmp_path / "other").end(None)
    assert code == 1 and "no recording" in err
    code, _, err = programs("ipc:///x", "--set", "kv_events_zmq_library=/none.so").end(None)
    assert code == 1 and "libzmq5" in err and "kv_events_zmq_library" in err


def test_a_recording_is_played_to_a_router(engine, programs, indexer, tmp_path):
    prompts, record = Prompts(2), tmp_path / "recording"
    p = programs(engine.options["kv_events_endpoint"], "--replay", engine.options["kv_events_replay_endpoint"], "--json",
                 "--record", record)
    load(engine, prompts, 100)
    engine.quiet()
    until(lambda: blocks_in(p.said()), engine.tiers["CPU"], "it shows")
    assert p.end()[0] == 0
    code, out, err = programs("--play", record, "--quiet").end(None)
    assert code == 0 and f"host {len(engine.tiers['CPU'])} " in out, out
    p = programs("--play", record, "--publish", f"ipc://{tmp_path}/played", "--speed", 0)
    indexer.register(1, 0, f"ipc://{tmp_path}/played")
    code, out, err = p.end(None)
    assert (code, err) == (0, "") and "batches published" in out
    assert compare(indexer, {1: engine}, prompts, 200) > 20


# ---- merging ----

TOKENS = [7000 + i for i in range(8 * BLOCK)]


def hashes(n):
    from oracle_rig import chain
    return chain(TENANTS[0], TOKENS)[:n]


def gpu_and_more(indexer):
    return indexer.query(TOKENS).get(1, (0, 0, 0))


@pytest.fixture(params=["own", "node"])
def engine_to_merge(request, tmp_path):
    """A node that publishes, or a daemon that does not."""
    if request.param == "own":
        it = Engine(flexkv, kv_events_endpoint=f"ipc://{tmp_path}/node", kv_events_rank=0,
                    kv_events_replay_endpoint=f"ipc://{tmp_path}/node-replay")
        it.merge_args = ["--own", f"ipc://{tmp_path}/node", "--own-replay", f"ipc://{tmp_path}/node-replay"]
    else:
        it = DaemonEngine(flexkv, tmp_path, enable_kv_events=1)
        it.merge_args = ["--node", it.address]
    yield it
    it.close()


@pytest.fixture
def merged(engine_to_merge, fake, programs, indexer, tmp_path):
    """An engine's and a node's stream in one, registered at the indexer."""
    engine, args = engine_to_merge, engine_to_merge.merge_args
    p = programs("--merge", fake.endpoint, "--replay", fake.replay, *args, "--publish", f"ipc://{tmp_path}/merged",
                 "--publish-replay", f"ipc://{tmp_path}/merged-replay")
    indexer.register(1, 0, f"ipc://{tmp_path}/merged", f"ipc://{tmp_path}/merged-replay")
    engine.put(TENANTS[0], TOKENS[:6 * BLOCK])
    until(lambda: gpu_and_more(indexer), (0, 24, 24))
    fake.send(stored(hashes(2), tokens=TOKENS[:8], medium="GPU"), seq=0)
    until(lambda: gpu_and_more(indexer), (8, 24, 24))
    return p


def test_merge(merged, engine_to_merge, fake, indexer):
    engine = engine_to_merge
    fake.send(removed(hashes(2)[1:], medium="GPU"))
    until(lambda: gpu_and_more(indexer), (4, 24, 24))
    fake.send(CLEARED)                                  # the node's blocks come back by themselves
    until(lambda: gpu_and_more(indexer), (0, 24, 24))
    fake.send(stored(hashes(3), tokens=TOKENS[:12]))
    until(lambda: gpu_and_more(indexer), (12, 24, 24))
    engine.node.reset()                                 # and the node's end leaves the engine's
    until(lambda: gpu_and_more(indexer), (12, 12, 12))
    engine.put(TENANTS[0], TOKENS)
    until(lambda: gpu_and_more(indexer), (12, 32, 32))
    if isinstance(engine, DaemonEngine):
        engine.kill_daemon()
    else:
        engine.reopen()
    until(lambda: gpu_and_more(indexer), (12, 12, 12))
    engine.put(TENANTS[0], TOKENS)
    until(lambda: gpu_and_more(indexer), (12, 32, 32))
    code, out, err = merged.end()
    assert code == 0, err


def test_merge_tells_a_new_router_all(merged, indexer):
    indexer.kill()
    indexer.start()
    until(lambda: gpu_and_more(indexer), (8, 24, 24))


def test_merge_recovers_what_the_engine_kept(merged, fake, indexer):
    fake.send(stored(hashes(3)[2:], hashes(2)[1], TOKENS[8:12]), lose=True)
    fake.send(stored(hashes(4)[3:], hashes(3)[2], TOKENS[12:16]))
    until(lambda: gpu_and_more(indexer), (16, 24, 24))


def test_merge_clears_what_is_lost(merged, fake, indexer):
    fake.send(stored([1, 2, 3], tokens=list(range(12))), seq=50)
    until(lambda: gpu_and_more(indexer), (0, 24, 24))
    until(lambda: indexer.query(list(range(12))).get(1, (0, 0, 0)), (12, 12, 12))
    _, out, err = merged.end()
    assert "lost for good" in err


def test_merge_with_an_engine_that_began_anew(merged, fake, indexer):
    fake.stop()
    fake.start()
    # Until the subscription finds it: what it says before is not heard.
    until(lambda: (fake.send(CLEARED, seq=0), gpu_and_more(indexer))[1], (0, 24, 24))
    for _ in range(3):
        fake.send(stored([1, 2, 3], tokens=list(range(12))))
        fake.send(removed([1, 2, 3]))
    fake.send(stored([1, 2, 3], tokens=list(range(12))))
    until(lambda: indexer.query(list(range(12))).get(1, (0, 0, 0)), (12, 12, 12))
    until(lambda: gpu_and_more(indexer), (0, 24, 24))
    _, out, err = merged.end()
    assert "began anew" in err
