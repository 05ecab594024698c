"""KVManager and KVTPClient: workers and nodes that come and go, SSD, a daemon that replicas share."""
import errno
import subprocess
import time

import pytest
from conftest import new_address, stopped, wait_until

np = pytest.importorskip("numpy")

from kvmanager_rig import (clean_pages, daemon_mode, engine, FIRST, HEAD, HEADS, LAYERS,  # noqa: F401
                           make_engine, prompt, quiet, SHAPES, slots_of, TOKENS, tokens_of, Worker)

import flexkv
from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig
from flexkv.common.request import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.program import find_program


# ---- the node ----

def test_nothing_hits_before_the_workers_have_come():
    manager = KVManager(ModelConfig(), CacheConfig(num_cpu_blocks=8),
                        server_recv_port=new_address())
    manager.start()
    try:
        assert not manager.is_ready()
        task, mask = manager.get_match(np.arange(64))
        assert not mask.any() and manager.wait(task)[task].status is Status.SUCCESS
        task = manager.put_async(np.arange(64), np.arange(64))
        response = manager.wait(task)[task]
        assert response.status is Status.SUCCESS and not response.return_mask.any()
        manager.reset()
        manager.reset()
    finally:
        manager.shutdown()


def test_one_address_for_two_engines_is_an_error(engine):
    manager = KVManager(ModelConfig(), CacheConfig(num_cpu_blocks=8),
                        server_recv_port=engine.manager.server_recv_port)
    with pytest.raises(flexkv.Error) as error:
        manager.start()
    assert error.value.errno == errno.EADDRINUSE
    assert engine.manager.server_recv_port in str(error.value)
    manager.shutdown()


def test_a_killed_worker_fails_its_tasks_and_a_new_one_takes_its_place(make_engine):
    engine = make_engine(model={"tp_size": 2})
    blocks = prompt(3)
    engine.put(blocks, [0, 1, 2])
    task, _ = engine.manager.get_match(tokens_of(blocks))
    engine.workers[1].kill()
    engine.manager.launch(task, slots_of([4, 5, 6]))
    response = engine.manager.wait(task, timeout=10)[task]
    assert response.status is Status.FAILED and not response.return_mask.any()
    engine.workers[1].start()
    for worker in engine.workers:
        worker.spoil()

    def works_again():
        task = engine.manager.get_async(tokens_of(blocks), slots_of([7, 8, 9]))
        response = engine.manager.wait(task)[task]
        return response.status is Status.SUCCESS and response.return_mask.all()

    wait_until(works_again, what="the new worker")
    engine.check(blocks, [7, 8, 9])


def test_a_task_does_not_end_while_its_pages_may_be_touched(make_engine, monkeypatch):
    monkeypatch.setenv("FLEXKV_OP_TIMEOUT_MS", "300")
    engine = make_engine(model={"tp_size": 2})
    manager, blocks = engine.manager, prompt(2)
    engine.put(blocks, [0, 1])
    task, _ = manager.get_match(tokens_of(blocks))
    with stopped(engine.workers[1].process.pid):
        manager.launch(task, slots_of([2, 3]))
        # The node gives the operation up after 0.3 s, and the worker a second later.
        assert manager.wait(task, timeout=2.5)[task].status is Status.TIMEOUT
        assert manager.kv_task_engine._busy
    assert manager.wait(task)[task].status is Status.FAILED
    for worker in engine.workers:
        worker.spoil()
    assert engine.get(blocks, [5, 6]) == 2


def test_workers_find_a_scheduler_that_starts_again(make_engine):
    engine = make_engine(model={"tp_size": 2})
    engine.put(prompt(2), [0, 1])
    address = engine.manager.server_recv_port
    engine.manager.shutdown()
    engine.manager = KVManager(engine.model, engine.cache, server_recv_port=address)
    engine.manager.start()
    wait_until(engine.manager.is_ready, what="readiness")
    blocks = prompt(3)
    engine.put(blocks, [3, 4, 5])
    assert engine.get(blocks, [8, 7, 6]) == 3


def test_shutdown_ends_what_is_under_way(make_engine, monkeypatch):
    monkeypatch.setenv("FLEXKV_OP_TIMEOUT_MS", "500")   # as long as it waits for a stuck worker
    engine = make_engine(model={"tp_size": 2})
    blocks = prompt(2)
    engine.put(blocks, [0, 1])
    task, _ = engine.manager.get_match(tokens_of(blocks))
    held, _ = engine.manager.get_match(tokens_of(blocks))
    with stopped(engine.workers[1].process.pid):
        engine.manager.launch(task, slots_of([2, 3]))
        start = time.monotonic()
        engine.manager.shutdown()
        assert time.monotonic() - start < 10
        for each in (task, held):
            assert engine.manager.wait(each, timeout=1)[each].status is Status.CANCELLED


@pytest.mark.parametrize("model_id, warm", [("model-a", True), ("", False)])
def test_restart_from_ssd(make_engine, tmp_path, model_id, warm):
    """Blocks on SSD are used again only if it is known whose they are."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 64, "ssd_cache_dir": [str(tmp_path / "ssd")]}
    blocks = prompt(6)
    engine = make_engine(model={"model_id": model_id}, **ssd)
    engine.put(blocks, list(range(6)))
    stats = engine.manager.kv_task_engine._node.stats
    wait_until(lambda: stats()["ssd"]["stored_blocks"] == 6, what="writing to the SSD")
    engine.close()
    engine = make_engine(model={"model_id": model_id}, **ssd)
    assert engine.get(blocks, list(range(10, 16))) == (6 if warm else 0)


def test_another_model_does_not_get_the_blocks(make_engine, tmp_path):
    ssd = {"enable_ssd": True, "num_ssd_blocks": 64, "ssd_cache_dir": [str(tmp_path / "ssd")]}
    make_engine(model={"model_id": "model-a"}, **ssd).close()
    manager = KVManager(ModelConfig(num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD,
                                    dtype="int16", model_id="model-b"),
                        CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=64, **ssd),
                        server_recv_port=new_address())
    manager.start()
    worker = Worker(tmp_path / "other", manager.gpu_register_port, FIRST, 0, 0, 0)

    def refused():
        try:
            assert not manager.is_ready()
        except flexkv.Error as error:
            assert error.errno == errno.EEXIST and "ssd_cache_dir" in str(error)
            return True
        return False

    wait_until(refused, what="the refusal")
    manager.shutdown()
    worker.kill()


def test_prefetch_brings_blocks_into_the_cpu_tier(make_engine, tmp_path):
    engine = make_engine(num_cpu_blocks=16, enable_ssd=True, num_ssd_blocks=64,
                         ssd_cache_dir=str(tmp_path / "ssd"))
    first, *others = prompt(6), prompt(6), prompt(6)
    stats = engine.manager.kv_task_engine._node.stats
    for i, blocks in enumerate((first, *others)):
        engine.put(blocks, list(range(6)))
        wait_until(lambda: stats()["ssd"]["stored_blocks"] == 6 * (i + 1), what="the SSD")
    task, mask = engine.manager.get_match(tokens_of(first), cpu_only=True)
    assert not mask[2 * TOKENS:].any()
    engine.manager.cancel(task)
    task = engine.manager.prefetch_async(np.concatenate([tokens_of(first), np.arange(40)]))
    response = engine.manager.wait(task)[task]
    assert response.status is Status.SUCCESS and response.return_mask.size == 6 * TOKENS + 40
    assert response.return_mask.sum() == 6 * TOKENS and response.return_mask[:6 * TOKENS].all()
    assert engine.get(first, [3, 4, 5, 6, 7, 8], cpu_only=True) == 6


# ---- a daemon ----

def test_replicas_share_a_daemon(make_engine):
    """One replica's blocks are the other's hits; the layouts of their memory may differ."""
    address = new_address()
    model = {"dp_size": 2, "tp_size": 2}
    first = make_engine(address=address, model=model, shape=SHAPES[0])
    second = make_engine(address=address, model=model, shape=SHAPES[3], dp_client_id=1)
    blocks, more = prompt(5), prompt(4)
    first.put(blocks, [0, 1, 2, 3, 4])
    assert second.get(blocks, [9, 8, 7, 6, 5]) == 5
    for worker in second.workers:
        worker.spoil()
    second.put(more, [0, 1, 2, 3])
    for worker in first.workers:
        worker.spoil()
    assert first.get(more, [20, 21, 22, 23]) == 4
    daemon = first.manager.server_handle.process
    second.close()
    first.close()
    assert daemon.poll() == 0, "the daemon ends when nobody needs it"


def test_instances_at_a_daemon_that_someone_else_started(make_engine, monkeypatch, tmp_path):
    monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_launch_mode", "external")
    address = new_address()
    daemon = subprocess.Popen([find_program(), "serve", "--address", address, "--set",
                               "num_cpu_blocks=64", "--set", "log_level=CRITICAL"])
    try:
        first = make_engine(address=address, model={"instance_num": 2})
        second = make_engine(address=address, model={"instance_num": 2}, dp_client_id=1)
        blocks = prompt(3)
        first.put(blocks, [0, 1, 2])
        assert second.get(blocks, [5, 6, 7]) == 3
        for engine in (first, second):
            engine.close()
        assert daemon.poll() is None, "it is not ours to end"
    finally:
        daemon.kill()
        daemon.wait()


def test_another_model_at_the_same_daemon_is_refused(make_engine, tmp_path):
    address = new_address()
    make_engine(address=address, model={"dp_size": 2})
    other = KVManager(ModelConfig(num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD,
                                  dtype="int16", model_id="other", dp_size=2),
                      CacheConfig(tokens_per_block=TOKENS), 1, server_recv_port=address)
    other.start()
    worker = Worker(tmp_path / "other", other.gpu_register_port, FIRST, 1, 0, 0)
    with pytest.raises(flexkv.Error) as error:
        wait_until(other.is_ready, what="the refusal")
    assert error.value.errno == errno.EEXIST
    other.shutdown()
    worker.kill()


def test_a_killed_daemon_means_misses(make_engine, daemon_mode):
    engine = make_engine()
    blocks = prompt(3)
    engine.put(blocks, [0, 1, 2])
    task, mask = engine.manager.get_match(tokens_of(blocks))
    assert mask.all()
    engine.manager.server_handle.process.kill()
    engine.manager.server_handle.process.wait()
    start = time.monotonic()
    engine.manager.launch(task, slots_of([4, 5, 6]))
    assert engine.manager.wait(task, timeout=10)[task].status is Status.FAILED
    assert engine.get(blocks, []) == 0
    task = engine.manager.put_async(tokens_of(blocks), slots_of([0, 1, 2]))
    assert engine.manager.wait(task, timeout=10)[task].status is Status.FAILED
    assert time.monotonic() - start < 5


def test_without_a_daemon_start_has_a_deadline(monkeypatch, daemon_mode):
    monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_launch_mode", "external")
    monkeypatch.setenv("FLEXKV_WORKER_TIMEOUT_MS", "300")
    address = new_address()
    manager = KVManager(ModelConfig(), CacheConfig(), server_recv_port=address)
    with pytest.raises(TimeoutError, match=address):
        manager.start()


def test_launch_modes(monkeypatch):
    monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_launch_mode", "external")
    with pytest.raises(ValueError, match="requires server-client mode"):
        KVManager(ModelConfig(), CacheConfig())
    monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_launch_mode", "somewhere")
    with pytest.raises(ValueError, match="embedded or external"):
        KVManager(ModelConfig(), CacheConfig())
    with pytest.raises(NotImplementedError, match="nnodes"):
        monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_launch_mode", "embedded")
        KVManager(ModelConfig(tp_size=2, nnodes=2), CacheConfig())
