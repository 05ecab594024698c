"""Workers in processes of their own, with a node in the scheduler's process (listen) and with a daemon in a third
one (serve). Every block that arrives is compared byte by byte, in the worker."""
import ctypes
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import flexkv
from conftest import Memory, finish, new_address, open_node, split_keys, stopped, wait_until
from processes import DaemonSide, Remote, WorkerSide

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "crash"))
import slot_table       # noqa: E402

GEOMETRY = {"fingerprint": b"test-model", "tokens_per_block": 4}


@pytest.fixture
def address():
    return new_address()


@pytest.fixture
def start():
    """start(side, ...) -> Remote; all are killed in the end."""
    remotes = []

    def begin(*args, **options):
        remotes.append(Remote(*args, **options))
        return remotes[-1]

    yield begin
    for remote in remotes:
        remote.kill()


def config_with(**options):
    config = flexkv.Config()
    for key, value in {"log_level": "CRITICAL", **options}.items():
        config.set(key, str(value))
    return config


def connect(address, server_timeout_ms=10000):
    return flexkv.Node.connect(address, config_with(server_timeout_ms=server_timeout_ms))


@pytest.fixture(params=["embedded", "daemon"])
def mode(request):
    return request.param


@pytest.fixture
def node(mode, address, start):
    """The scheduler's node: its own, or that of a daemon in another process."""
    if mode == "daemon":
        start(DaemonSide, address)
        node = connect(address)
    else:
        node = open_node()
        node.listen(address)
    yield node
    node.close()


def keys_of(namespace, chain, blocks):
    return namespace.keys_from_tokens([chain * 1000003 + i for i in range(blocks * 4)])


def put(node, namespace, keys, pages, workers):
    for worker in workers:
        worker.ask("fill", pages, split_keys(keys))
    done = finish(node, namespace.put(keys, 0, pages))
    assert (done.status, done.blocks_ok) == (0, len(pages))


def get_and_check(node, namespace, keys, pages, workers):
    found = namespace.match(keys)
    assert found.blocks == len(pages)
    for worker in workers:
        worker.ask("spoil")
    done = finish(node, node.get(found.lease, 0, pages))
    assert (done.status, done.blocks_ok) == (0, len(pages))
    for worker in workers:
        assert worker.ask("wrong", pages, split_keys(keys)) == []


# ---- one engine ----

@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_of_each_worker_come_back(node, address, start, ranks):
    workers = [start(WorkerSide, address, instance="e", worker=i, slice=i) for i in range(ranks)]
    space = node.space(ranks=ranks, instance="e", workers=ranks, **GEOMETRY)
    wait_until(lambda: [w.ask("state") for w in workers] == [1] * ranks, what="the workers' registration")
    namespace = space.namespace("tenant")
    for chain in range(4):
        keys = keys_of(namespace, chain, 12)
        put(node, namespace, keys, list(range(12)), workers)
        get_and_check(node, namespace, keys, list(range(63, 51, -1)), workers)
    stats = node.stats()
    assert (stats["puts"], stats["gets"], stats["get_failed_blocks"]) == (4, 4, 0)
    assert json.loads(node.status())


def test_workers_with_the_same_slice(node, address, start):
    """Each block is stored by one of them, and loaded by all."""
    workers = [start(WorkerSide, address, instance="e", worker=i, replica=i, replicas=2) for i in range(2)]
    space = node.space(ranks=1, instance="e", workers=2, **GEOMETRY)
    namespace = space.namespace()
    keys, pages = keys_of(namespace, 1, 20), list(range(20))
    put(node, namespace, keys, pages, workers)
    get_and_check(node, namespace, keys, list(range(30, 50)), workers)

    # With other bytes in each, which no real engine has, one sees who has stored a block.
    keys = keys_of(namespace, 2, 20)
    texts = [split_keys(keys_of(namespace, other, 20)) for other in (3, 4)]
    for worker, text in zip(workers, texts):
        worker.ask("fill", pages, text)
    assert finish(node, namespace.put(keys, 0, pages)).blocks_ok == 20
    for worker in workers:
        worker.ask("spoil")
    assert finish(node, node.get(namespace.match(keys).lease, 0, pages)).blocks_ok == 20
    first, second = ([worker.ask("holds", pages, text) for text in texts] for worker in workers)
    assert first == second
    assert all(a != b for a, b in zip(*first)) and 5 <= sum(first[0]) <= 15


def test_completions_wake_a_waiting_poll(node, address, start):
    worker = start(WorkerSide, address, instance="e")
    namespace = node.space(instance="e", workers=1, **GEOMETRY).namespace()
    keys = keys_of(namespace, 1, 8)
    put(node, namespace, keys, list(range(8)), [worker])
    done = []
    thread = threading.Thread(target=lambda: done.extend(node.poll(timeout_ms=20000)))
    thread.start()
    time.sleep(0.1)
    start_time = time.monotonic()
    op = node.get(namespace.match(keys).lease, 0, list(range(8)))
    thread.join(20)
    assert [c.op for c in done] == [op]
    assert time.monotonic() - start_time < 2


def test_close_ends_a_waiting_poll(node):
    errors = []

    def wait():
        with pytest.raises(flexkv.Error) as e:
            node.poll(timeout_ms=-1)
        errors.append(e.value.errno)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    node.close()
    thread.join(20)
    assert errors == [errno.EBADF]


# ---- meeting ----

def test_workers_may_come_first(address, start):
    worker = start(WorkerSide, address, instance="e")
    time.sleep(0.3)
    assert worker.ask("state") == 0
    with open_node() as node:
        node.listen(address)
        space = node.space(instance="e", workers=1, wait_ms=20000, **GEOMETRY)
        wait_until(lambda: worker.ask("state") == 1, what="the worker's registration")
        keys = keys_of(space.namespace(), 1, 5)
        put(node, space.namespace(), keys, list(range(5)), [worker])
        get_and_check(node, space.namespace(), keys, list(range(10, 15)), [worker])


def test_missing_worker_is_a_clear_error(node, address, start):
    start(WorkerSide, address, instance="e", worker=0)
    began = time.monotonic()
    with pytest.raises(flexkv.Error, match="(?s)worker") as e:
        node.space(ranks=2, instance="e", workers=2, wait_ms=500, **GEOMETRY)
    assert e.value.errno == errno.ETIMEDOUT
    assert 0.4 < time.monotonic() - began < 10


def test_worker_with_other_pages_is_turned_away(node, address, start):
    good = start(WorkerSide, address, instance="e", worker=0)
    space = node.space(instance="e", workers=1, **GEOMETRY)
    bad = start(WorkerSide, address, (100, 200), instance="e", worker=1)
    wait_until(lambda: bad.ask("state") != 0, what="an answer to the worker")
    assert bad.ask("state") < 0
    assert bad.ask("error")
    wait_until(lambda: (good.ask("state"), good.ask("error")) == (1, ""), what="the good worker's registration")
    assert keys_of(space.namespace(), 1, 2)


def test_address_in_use(address, start):
    with open_node() as first, open_node() as second:
        first.listen(address)
        with pytest.raises(flexkv.Error, match=str(os.getpid())) as e:
            second.listen(address)
        assert e.value.errno == errno.EADDRINUSE
        with pytest.raises(flexkv.Error, match="carrier://pigeon") as e:
            second.listen("carrier://pigeon")
        assert e.value.errno == errno.EINVAL


def test_nobody_to_connect_to(address):
    with pytest.raises(flexkv.Error) as e:
        connect(address)
    assert e.value.errno == errno.ECONNREFUSED
    assert address in str(e.value)


def test_connect_to_something_else(address):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + address.removeprefix("ipc://@"))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(flexkv.Error) as e:
            connect(address, server_timeout_ms=500)
        assert e.value.errno in (errno.ETIMEDOUT, errno.EPROTO)
        assert time.monotonic() - began < 5


# ---- several engines ----

def test_one_engines_blocks_are_the_others_hits(address, start):
    start(DaemonSide, address)
    engines = []
    for name in ("a", "b"):
        workers = [start(WorkerSide, address, space="model", instance=name, worker=i, slice=i) for i in range(2)]
        node = connect(address)
        space = node.space("model", ranks=2, instance=name, workers=2, **GEOMETRY)
        engines.append((node, space.namespace(), workers))
    (node_a, ns_a, workers_a), (node_b, ns_b, workers_b) = engines
    keys = keys_of(ns_a, 1, 10)
    assert keys_of(ns_b, 1, 10) == keys
    put(node_a, ns_a, keys, list(range(10)), workers_a)
    for worker in workers_a:
        worker.ask("spoil")
    get_and_check(node_b, ns_b, keys, list(range(20, 30)), workers_b)
    assert [w.ask("wrong", [], []) for w in workers_a] == [[], []]
    node_a.close()
    get_and_check(node_b, ns_b, keys, list(range(40, 50)), workers_b)
    node_b.close()


def test_memory_of_this_process_at_a_daemon(address, start):
    start(DaemonSide, address)
    memory = Memory()
    with connect(address) as node:
        space = node.space(slice_bytes=memory.slice_bytes, **GEOMETRY)
        space.register(0, memory.regions(0))
        namespace = space.namespace()
        keys = keys_of(namespace, 1, 6)
        for page, key in enumerate(split_keys(keys)):
            memory.fill(page, key)
        assert finish(node, namespace.put(keys, 0, list(range(6)))).blocks_ok == 6
        assert finish(node, node.get(namespace.match(keys).lease, 0, list(range(10, 16)))).blocks_ok == 6
        assert all(memory.holds(10 + i, key) for i, key in enumerate(split_keys(keys)))
        space.unregister(0)


def test_a_served_node_becomes_idle(address, start):
    daemon = start(DaemonSide, address)
    assert daemon.ask("wait_idle", 0, 300) is False, "nobody has come yet"
    with connect(address) as node:
        node.space(slice_bytes=4096, **GEOMETRY)
        assert daemon.ask("wait_idle", 100, 600) is False
    assert daemon.ask("wait_idle", 100, 10000) is True


# ---- death ----

def test_killed_worker_is_replaced(node, address, start):
    first = start(WorkerSide, address, instance="e")
    namespace = node.space(instance="e", workers=1, **GEOMETRY).namespace()
    keys = keys_of(namespace, 1, 6)
    put(node, namespace, keys, list(range(6)), [first])
    first.kill()
    second = start(WorkerSide, address, instance="e")
    wait_until(lambda: second.ask("state") == 1, what="the new worker's registration")
    get_and_check(node, namespace, keys, list(range(20, 26)), [second])


def test_operations_end_while_a_worker_is_stopped(node, address, start):
    """What was under way ends in time; after revoke the late copy touches nothing any more."""
    worker = start(WorkerSide, address, instance="e")
    namespace = node.space(instance="e", workers=1, **GEOMETRY).namespace()
    keys = keys_of(namespace, 1, 16)
    put(node, namespace, keys, list(range(16)), [worker])
    worker.ask("spoil")
    with stopped(worker.process.pid):
        began = time.monotonic()
        op = node.get(namespace.match(keys).lease, 0, list(range(30, 46)), timeout_ms=500)
        done = finish(node, op)
        assert time.monotonic() - began < 10
        assert done.status < 0 and done.blocks_ok < 16
        assert done.flags & flexkv.PAGES_BUSY
    assert worker.ask("revoke", [op]) is True
    worker.ask("spoil")
    time.sleep(0.2)
    assert worker.ask("wrong", [], []) == []
    get_and_check(node, namespace, keys, list(range(16)), [worker])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_daemon_comes_back(address, start, tmp_path, number):
    options = {"ssd_cache_dir": str(tmp_path), "ssd_cache_blocks": 64}
    daemon = start(DaemonSide, address, **options)
    worker = start(WorkerSide, address, instance="e")
    with connect(address) as node:
        namespace = node.space(instance="e", workers=1, **GEOMETRY).namespace()
        keys = keys_of(namespace, 1, 6)
        put(node, namespace, keys, list(range(6)), [worker])
        wait_until(lambda: len(slot_table.read_records([tmp_path])) == 6, what="writing to the SSD")
        os.kill(daemon.process.pid, number)
        daemon.process.join(20)
        wait_until(lambda: namespace.match(keys).blocks == 0, what="a miss")
        start(DaemonSide, address, **options)
        wait_until(lambda: namespace.match(keys).blocks == 6, what="the blocks from SSD")
        wait_until(lambda: worker.ask("state") == 1, what="the worker's return")
        get_and_check(node, namespace, keys, list(range(20, 26)), [worker])


def test_stopped_daemon_does_not_stop_the_interpreter(address, start):
    daemon = start(DaemonSide, address)
    worker = start(WorkerSide, address, instance="e")
    with connect(address, server_timeout_ms=800) as node:
        namespace = node.space(instance="e", workers=1, **GEOMETRY).namespace()
        keys = keys_of(namespace, 1, 6)
        put(node, namespace, keys, list(range(6)), [worker])
        counted, stop = 0, threading.Event()

        def count():
            nonlocal counted
            while not stop.is_set():
                counted += 1

        with stopped(daemon.process.pid):
            thread = threading.Thread(target=count)
            thread.start()
            before, began = counted, time.monotonic()
            found = namespace.match(keys)
            waited, progress = time.monotonic() - began, counted - before
            stop.set()
            thread.join()
            assert found.blocks == 0
            assert 0.3 < waited < 5
            assert progress > 10000
        wait_until(lambda: namespace.match(keys).blocks == 6, what="the daemon's return")


# ---- ends ----

def test_worker_and_daemon_end_without_closing(node, address, start):
    worker = start(WorkerSide, address, instance="e")
    node.space(instance="e", workers=1, **GEOMETRY)
    assert worker.leave() == 0


def test_agent_alone_ends_without_closing(address, start):
    assert start(WorkerSide, address).leave() == 0


def test_served_node_ends_without_closing(address, start):
    daemon = start(DaemonSide, address)
    with connect(address):
        assert daemon.leave() == 0


def test_socket_files_go_with_the_node(tmp_path, start):
    path = tmp_path / "flexkv.sock"
    with open_node() as node:
        node.listen(f"ipc://{path}")
        assert path.is_socket()
        worker = start(WorkerSide, f"ipc://{path}", instance="e")
        node.space(instance="e", workers=1, **GEOMETRY)
        wait_until(lambda: worker.ask("state") == 1, what="the worker's registration")
    assert not path.exists()


def test_closed_agent_refuses(address):
    memory = Memory()
    agent = flexkv.Agent(address, memory.regions(0))
    assert (agent.state(), agent.error, agent.closed) == (0, "", False)
    assert agent.revoke([]) is True and agent.revoke((1, 2), timeout_ms=0) is True
    with agent:
        pass
    agent.close()
    assert agent.closed
    for call in (agent.state, lambda: agent.revoke([1]), lambda: agent.error):
        with pytest.raises(flexkv.Error, match="the agent is closed") as e:
            call()
        assert e.value.errno == errno.EBADF


@pytest.mark.parametrize("arguments, options, error", [
    (("ipc://@x",), {}, TypeError), (("ipc://@x", []), {}, flexkv.Error), (("ipc://@x", [(1, 2, 3)]), {}, TypeError),
    (("ipc://@x", [(1 << 20, 8, 8, 1)]), {"worker": -1}, ValueError),
    (("ipc://@x", [(1 << 20, 8, 8, 1)]), {"replica": 2, "replicas": 2}, flexkv.Error),
    (("ipc://@x", [(1 << 20, 8, 16, 1)]), {}, flexkv.Error), (("ipc://@x", [(1 << 20, 8, 8, 1)], "space"), {}, TypeError)])
def test_bad_agents(arguments, options, error):
    with pytest.raises(error):
        flexkv.Agent(*arguments, **options)


def test_agents_do_not_leak(address):
    memory = Memory()

    def once():
        with flexkv.Agent(address, memory.regions(0)):
            pass

    def in_use():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    once()
    before = in_use()
    for _ in range(50):
        once()
    assert in_use() == before
    assert ctypes.sizeof(memory.buffers[0, 0])
