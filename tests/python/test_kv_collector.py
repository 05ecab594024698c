"""KVManager's event_collector: KV events in the form that vLLM publishes."""
import pytest
from conftest import new_address, wait_until

np = pytest.importorskip("numpy")

from kvmanager_rig import (TOKENS, clean_pages, daemon_mode, make_engine,  # noqa: F401
                           prompt, quiet, tokens_of)

from flexkv.integration.dynamo.collector import KVEventCollector


def collected(collector, count):
    """So many events, which may come in several parts."""
    events = []

    def enough():
        events.extend(collector.take_events())
        return len(events) >= count

    wait_until(enough, what=f"{count} events")
    assert len(events) == count and not collector.take_events()
    return events


@pytest.fixture(params=["embedded", "daemon"])
def mode(request):
    if request.param == "daemon":
        request.getfixturevalue("daemon_mode")


def test_what_is_stored_and_dropped(mode, make_engine):  # noqa: F811
    collector = KVEventCollector()
    engine = make_engine(address=new_address(), collector=collector)
    blocks = prompt(7)
    engine.put(blocks[:4], [0, 1, 2, 3])
    stored, = collected(collector, 1)
    assert (stored.parent_block_hash, stored.block_size, stored.medium) == (None, TOKENS, "CPU")
    assert stored.token_ids == tokens_of(blocks[:4]).tolist() and len(set(stored.block_hashes)) == 4
    engine.put(blocks, [0, 1, 2, 3, 4, 5, 6])
    more, = collected(collector, 1)
    assert more.parent_block_hash == stored.block_hashes[-1]
    assert more.token_ids == tokens_of(blocks[4:]).tolist()
    engine.put(prompt(3), [0, 1, 2], namespace=["tenant"])
    assert not collector.take_events(), "a router would give them to everybody"
    engine.manager.reset()
    gone = []
    wait_until(lambda: gone.extend(h for e in collector.take_events() for h in e.block_hashes)
               or len(gone) >= 7, what="the blocks' end")
    assert sorted(gone) == sorted(stored.block_hashes + more.block_hashes)
    engine.close()
    assert not collector.take_events()


def test_without_a_collector_there_are_no_events(make_engine):  # noqa: F811
    engine = make_engine()
    engine.put(prompt(3), [0, 1, 2])
    assert engine.manager.kv_task_engine._node.stats()["events"] == 0


def test_what_a_caller_publishes_comes_out_unchanged():
    collector = KVEventCollector()
    collector.publish_stored(np.array([1, 2]), block_size=16)
    collector.publish_removed(np.array([1]), medium="STORAGE")
    stored, removed = collector.take_events()
    assert (stored.block_hashes, stored.medium, removed.block_hashes, removed.medium) == (
        [1, 2], "CPU", [1], "STORAGE")
    assert not collector.take_events()
    collector.close()
