"""KV events of real nodes, judged by a real router: whatever happens in between, once it is quiet Dynamo's
indexer answers for thousands of random prompts what the nodes hold, block for block.

FLEXKV_ORACLE_SCALE multiplies the load (default 0.6: half a minute in all)."""
import os
import signal
import threading
import time

import pytest

from oracle_rig import BLOCK, MODEL, TENANTS, DaemonEngine, Engine, Indexer, Prompts, Selector, chain, compare, load, load_extension

flexkv = load_extension()
SCALE = float(os.environ.get("FLEXKV_ORACLE_SCALE", "0.6"))


def scaled(n):
    return int(n * SCALE)


@pytest.fixture
def indexer(tmp_path):
    it = Indexer(tmp_path)
    yield it
    it.close()


@pytest.fixture
def engines(tmp_path):
    """makes(name, **options) -> an Engine that publishes at ipc://tmp/name."""
    made = []

    def make(name, replay=True, **options):
        options = {"kv_events_endpoint": f"ipc://{tmp_path}/{name}", **options}
        if replay:
            options["kv_events_replay_endpoint"] = f"ipc://{tmp_path}/{name}-replay"
        engine = Engine(flexkv, **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def register(indexer, instance, rank, engine):
    indexer.register(instance, rank, engine.options["kv_events_endpoint"],
                     engine.options.get("kv_events_replay_endpoint"))


def test_namespaces_whose_blocks_have_one_name(indexer, engines):
    """A router hears of a hash once, and of its end when the last block behind it has gone."""
    engine = engines("a", cpu_cache_blocks=40)
    register(indexer, 1, 0, engine)
    tokens, hashes = list(range(8 * BLOCK)), chain(TENANTS[0], list(range(8 * BLOCK)))

    def is_heard(number):
        marker, end = list(range(number, number + BLOCK)), time.monotonic() + 20
        engine.put(TENANTS[0], marker)
        while indexer.query(marker).get(1) != (0, BLOCK, BLOCK):
            assert time.monotonic() < end
            time.sleep(0.05)

    is_heard(4000)                                      # the indexer is there, and hears each event
    for name in ("x", "y"):
        namespace = engine.space.namespace(name)
        engine.wait_for(namespace.put(namespace.keys_from_tokens(tokens), 0, list(range(8)), event_hashes=hashes,
                                      event_tokens=tokens, event_parent=None))
    y = namespace.keys_from_tokens(tokens)
    for i in range(30):                                 # x goes, y is used again and again
        engine.put(TENANTS[0], [10**6 + i] * 4 * BLOCK)
        found = namespace.match(y)
        engine.wait_for(engine.node.get(found.lease, 0, list(range(found.blocks))))
        assert found.blocks == 8
    is_heard(5000)
    x = engine.space.namespace("x")
    assert x.match(x.keys_from_tokens(tokens)).blocks == 0
    assert indexer.query(tokens).get(1) == (0, 8 * BLOCK, 8 * BLOCK)


def test_select_service(engines, tmp_path):
    """The same index behind the choice of a worker: it goes to the node that has the prompt."""
    (tmp_path / "ssd").mkdir()
    selector, prompts = Selector(tmp_path), Prompts(8)
    try:
        made = {1: engines("a"), 2: engines("b", ssd_cache_blocks=600, ssd_cache_dir=tmp_path / "ssd")}
        for instance, engine in made.items():
            register(selector, instance, 0, engine)
            load(engine, prompts, scaled(100))
        assert compare(selector, made, prompts, scaled(200)) > scaled(10)
        tokens = list(range(5000, 5000 + 10 * BLOCK))
        for instance, engine in made.items():
            engine.put(TENANTS[0], tokens)
            end = time.monotonic() + 20
            while (answer := selector.select(tokens))["worker_id"] != instance or not answer["overlap"]["cpu"]:
                assert time.monotonic() < end, answer
                time.sleep(0.05)
            assert (answer["overlap"]["cpu"], answer["effective_prefill_tokens"]) == (10 * BLOCK, 10)
            engine.node.reset()
    finally:
        selector.close()


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "no-replay"])
def test_host_tier(indexer, engines, replay):
    prompts, engine = Prompts(1), engines("a", replay)
    register(indexer, 1, 0, engine)
    for _ in range(3):
        load(engine, prompts, scaled(150))
        assert compare(indexer, {1: engine}, prompts, scaled(300)) > scaled(10)


def test_late_subscriber_and_restarted_one(indexer, engines):
    prompts, engine = Prompts(2), engines("a")
    load(engine, prompts, scaled(150))
    register(indexer, 1, 0, engine)
    compare(indexer, {1: engine}, prompts, scaled(200))
    indexer.kill()
    load(engine, prompts, scaled(50))
    indexer.start()
    assert compare(indexer, {1: engine}, prompts, scaled(200)) > scaled(10)


def test_restarted_node(indexer, engines, tmp_path):
    """Its host memory is gone, its SSD is not; the numbers of its stream go on."""
    (tmp_path / "ssd").mkdir()
    prompts = Prompts(3)
    engine = engines("a", ssd_cache_blocks=600, ssd_cache_dir=tmp_path / "ssd")
    register(indexer, 1, 0, engine)
    for _ in range(3):
        load(engine, prompts, scaled(100))
        compare(indexer, {1: engine}, prompts, scaled(150))
        engine.reopen()
        assert compare(indexer, {1: engine}, prompts, scaled(150)) > 0


def test_reset(indexer, engines):
    prompts, engine = Prompts(4), engines("a")
    register(indexer, 1, 0, engine)
    load(engine, prompts, scaled(100))
    engine.node.reset()
    assert compare(indexer, {1: engine}, prompts, scaled(200)) == 0
    load(engine, prompts, scaled(50))
    assert compare(indexer, {1: engine}, prompts, scaled(200)) > 0


def test_several_nodes_and_ranks(indexer, engines):
    """Two workers, and one node that two ranks of a third share."""
    prompts = Prompts(5)
    made = {1: engines("a"), 2: engines("b", kv_events_rank=0), 3: engines("c", kv_events_rank=0, kv_events_ranks=2)}
    for instance, engine in made.items():
        register(indexer, instance, 0, engine)
    for engine in made.values():
        load(engine, prompts, scaled(100))
    compare(indexer, made, prompts, scaled(200))
    tenant = TENANTS[0]
    tokens = list(range(1000, 1000 + 8 * BLOCK))
    made[3].put(tenant, tokens)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        answer = indexer.call("/query", {"token_ids": tokens, "model_name": MODEL})
        ranks = answer["instances"].get("3", {}).get("dp", {})
        if set(ranks) == {"0", "1"}:
            break
        time.sleep(0.05)
    assert set(ranks) == {"0", "1"}, answer


def test_daemon_that_is_killed(indexer, tmp_path):
    """kill -9: nothing takes back what it offered but its successor, which has its SSD."""
    (tmp_path / "ssd").mkdir()
    prompts = Prompts(7)
    engine = DaemonEngine(flexkv, tmp_path, kv_events_endpoint=f"ipc://{tmp_path}/pub", ssd_cache_blocks=600,
                          ssd_cache_dir=tmp_path / "ssd")
    try:
        register(indexer, 1, 0, engine)
        for _ in range(2):
            load(engine, prompts, scaled(80))
            assert compare(indexer, {1: engine}, prompts, scaled(150)) > 0
            engine.kill_daemon()
            assert compare(indexer, {1: engine}, prompts, scaled(150)) > 0
    finally:
        engine.close()


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "no-replay"])
def test_batches_are_lost(indexer, engines, replay):
    """A subscriber that stands still while there is room for two batches only."""
    prompts = Prompts(6)
    engine = engines("a", replay, kv_events_hwm=2, kv_events_replay_batches=4, cpu_cache_blocks=2000)
    register(indexer, 1, 0, engine)
    load(engine, prompts, 30)
    compare(indexer, {1: engine}, prompts, 50)
    indexer.signal(signal.SIGSTOP)
    try:
        stop = threading.Timer(30, indexer.signal, [signal.SIGCONT])    # whatever happens
        stop.start()
        lost, rounds = 0, 0
        while not lost and rounds < 40:
            load(engine, prompts, 100)
            time.sleep(0.05)
            lost = dropped(engine)
            rounds += 1
    finally:
        stop.cancel()
        indexer.signal(signal.SIGCONT)
    assert lost, "nothing was lost, so nothing was tried"
    assert compare(indexer, {1: engine}, prompts, scaled(300)) > scaled(10)


def dropped(engine):
    import json
    return json.loads(engine.node.status())["kv_events"]["dropped_batches"]
