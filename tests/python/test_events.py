"""KV events: what a put gives, what a subscription says."""
import array
import errno
import gc
import os
import random
import select
import threading

import pytest

import flexkv
from conftest import Memory, finish, open_node

BLOCK = 4


def names(chain, first, n, width=32):
    """The engine's hashes as bytes, and the tokens, of blocks [first, first + n)."""
    hashes = [random.Random(f"{chain}/{i}").randbytes(width) for i in range(first, first + n)]
    return hashes, [chain * 1000 + i for i in range(first * BLOCK, (first + n) * BLOCK)]


def number(h):
    return int.from_bytes(h, "big") & (2**64 - 1)


def put_named(rig, chain, n, first=0, hashes=None, tokens=None, parent=None, namespace=None):
    h, t = names(chain, first, n - first)
    keys = rig.keys(chain, n, namespace)
    if parent is None and first:
        parent = names(chain, first - 1, 1)[0][0]
    op = (namespace or rig.namespace).put(
        keys, first, list(range(n - first)), event_hashes=h if hashes is None else hashes,
        event_tokens=t if tokens is None else tokens, event_parent=parent)
    done = finish(rig.node, op)
    assert done.blocks_ok == n - first
    return [number(x) for x in h], t


@pytest.fixture
def events_rig(make_rig):
    return make_rig(enable_kv_events=1)


def test_blocks_of_a_prompt_come_in_one_tuple(events_rig):
    events = events_rig.node.events()
    assert events.take() == []
    hashes, tokens = put_named(events_rig, 1, 8)
    assert select.select([events.fileno()], [], [], 5)[0]
    assert events.take() == [(True, "CPU", hashes, None, tokens, BLOCK, None, None)]
    assert events.take() == []
    assert not select.select([events.fileno()], [], [], 0)[0]
    more, tokens = put_named(events_rig, 1, 12, first=8)
    assert events.take() == [(True, "CPU", more, hashes[-1], tokens, BLOCK, None, None)]
    events.close()
    events.close()
    with pytest.raises(flexkv.Error) as error:
        events.take()
    assert error.value.errno == errno.EBADF


def test_removed_and_again(events_rig):
    events = events_rig.node.events(events_rig.space)
    hashes, tokens = put_named(events_rig, 1, 8)
    assert len(events.take()) == 1
    events.again()
    assert [e[2] for e in events.take()] == [hashes]
    events_rig.node.reset()
    (gone,) = events.take()
    assert (gone[0], gone[1], sorted(gone[2]), gone[3:]) == (False, "CPU", sorted(hashes), (None, [], 0, None, None))
    stats = events_rig.node.stats()
    assert (stats["events"], stats["events_taken"], stats["event_resyncs"]) == (16, 24, 0)


@pytest.mark.parametrize("kind", ["bytes", "int", "negative", "array", "tuple", "raw"])
def test_hashes_and_tokens_in_all_forms(events_rig, kind):
    h, t = names(7, 0, 5)
    numbers = [number(x) for x in h]
    hashes = {"bytes": h, "int": [int.from_bytes(x, "big") for x in h], "negative": [x - 2**64 for x in numbers],
              "array": array.array("Q", numbers), "tuple": tuple(h),
              "raw": array.array("Q", numbers).tobytes()}[kind]
    tokens = {"array": array.array("I", t), "tuple": tuple(t)}.get(kind, t)
    events = events_rig.node.events()
    put_named(events_rig, 7, 5, hashes=hashes, tokens=tokens)
    assert events.take() == [(True, "CPU", numbers, None, t, BLOCK, None, None)]


def test_labels(events_rig):
    tenant = events_rig.space.namespace("tenant")
    tenant.label("adapter", cache_salt="sälz")
    events = events_rig.node.events()
    hashes, tokens = put_named(events_rig, 1, 3, namespace=tenant)
    plain, plain_tokens = put_named(events_rig, 2, 3)
    assert events.take() == [(True, "CPU", hashes, None, tokens, BLOCK, "adapter", "sälz"),
                             (True, "CPU", plain, None, plain_tokens, BLOCK, None, None)]
    tenant.label()
    with pytest.raises(flexkv.Error):
        tenant.label("x" * 256)
    with pytest.raises(ValueError):
        tenant.label("a\0b")


def test_portions(events_rig):
    events = events_rig.node.events()
    hashes, _ = put_named(events_rig, 1, 30)
    seen = []
    while got := events.take(max_blocks=7):
        assert sum(len(e[2]) for e in got) <= 7
        seen += [h for e in got for h in e[2]]
    assert seen == hashes


def test_wrong_names_are_refused(events_rig):
    keys, pages = events_rig.keys(1, 4), [0, 1, 2, 3]
    h, t = names(1, 0, 4)
    put = events_rig.namespace.put
    for bad in ({"event_hashes": h}, {"event_hashes": h[:3], "event_tokens": t},
                {"event_hashes": h, "event_tokens": t[:-1]}, {"event_hashes": [b"short"] * 4, "event_tokens": t},
                {"event_hashes": h, "event_tokens": t, "event_parent": b"short"}):
        with pytest.raises(ValueError):
            put(keys, 0, pages, **bad)
    for bad in ({"event_hashes": ["x"] * 4, "event_tokens": t}, {"event_hashes": h, "event_tokens": "abcd"},
                {"event_hashes": array.array("d", [1.0] * 4), "event_tokens": t}):
        with pytest.raises(TypeError):
            put(keys, 0, pages, **bad)
    assert events_rig.node.stats()["operations"] == 0
    with pytest.raises(TypeError):
        events_rig.node.events(space=3)


def test_off_is_said(rig):
    with pytest.raises(flexkv.Error) as error:
        rig.node.events()
    assert error.value.errno == errno.EOPNOTSUPP and "enable_kv_events" in str(error.value)
    put_named(rig, 1, 4)


def test_life(make_rig):
    rig = make_rig(enable_kv_events=1)
    events = rig.node.events()
    rig.node.close()
    with pytest.raises(flexkv.Error):
        events.take()
    events.close()
    rig = make_rig(enable_kv_events=1)
    events = rig.node.events()
    node = open_node(enable_kv_events=1)
    other = node.events()
    del node
    gc.collect()
    assert other.take() == []           # it keeps its node
    del other, events
    gc.collect()
    pid = os.fork() if hasattr(os, "fork") else 0
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_closing_while_others_take(make_rig):
    rig = make_rig(enable_kv_events=1)
    events = [rig.node.events() for _ in range(4)]
    stop = threading.Event()

    def take(mine):
        while not stop.is_set():
            try:
                mine.take()
            except flexkv.Error as error:
                assert error.errno in (errno.EBADF, errno.ENOTCONN)
                return

    threads = [threading.Thread(target=take, args=(e,)) for e in events for _ in range(2)]
    for thread in threads:
        thread.start()
    for chain in range(20):
        put_named(rig, chain, 8)
    events[0].close()
    rig.node.close()
    for e in events:
        e.close()
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_daemons_events(tmp_path):
    address = f"ipc://{tmp_path}/daemon"
    daemon = open_node(enable_kv_events=1)
    daemon.serve(address)
    node = flexkv.Node.connect(address)
    memory = Memory(64)
    space = node.space(fingerprint=b"test-model", tokens_per_block=BLOCK, slice_bytes=memory.slice_bytes)
    space.register(0, memory.regions(0))
    namespace = space.namespace("tenant")
    namespace.label(cache_salt="salt")
    events, all_events = node.events(space), node.events()
    assert events.take() == []
    hashes, tokens = names(3, 0, 6)
    keys = namespace.keys_from_tokens(tokens)
    op = namespace.put(keys, 0, list(range(6)), event_hashes=hashes, event_tokens=tokens)
    assert finish(node, op).blocks_ok == 6
    expected = [(True, "CPU", [number(h) for h in hashes], None, tokens, BLOCK, None, "salt")]
    assert select.select([events.fileno()], [], [], 10)[0]
    assert events.take() == expected
    assert all_events.take() == expected
    node.reset()
    assert select.select([events.fileno()], [], [], 10)[0]
    assert [(e[0], sorted(e[2])) for e in events.take()] == [(False, sorted(number(h) for h in hashes))]
    node.close()
    daemon.close()
