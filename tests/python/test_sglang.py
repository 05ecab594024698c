"""The SGLang connector on CPU tensors, with ranks that are processes and talk over gloo; and tensors
of torch in general. SGLang itself is not needed: its cache pool is a list of tensors here."""
import contextlib
import importlib.abc
import importlib.util
import os
import socket
import sys
import types
import unittest.mock
from multiprocessing import get_context

import pytest
from conftest import wait_until

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from flexkv.common.memory_handle import TensorSharedHandle
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.integration.sglang.connector import FlexKVConnector, FlexKVHostReleaseShim
from flexkv.server.client import KVTPClient
from flexkv.server.regions import group_regions, layered_regions

PAGE, PAGES, LAYERS, HEADS, HEAD = 4, 20, 2, 2, 6
SPAWN = get_context("spawn")


# ---- tensors ----

def layout():
    return KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, PAGES, PAGE, HEADS, HEAD,
                         num_kv_heads=HEADS)


def test_registered_tensors_are_in_shared_memory_and_stay_there():
    """Sending a tensor to another process moves it, unless it is shared already."""
    tensors = [torch.zeros(2, PAGES, PAGE, HEADS, HEAD) for _ in range(LAYERS)]
    client = KVTPClient("ipc://@nobody", 0, 0)
    client.register_to_server(tensors, layout())
    where = [tensor.data_ptr() for tensor in tensors]
    handles = [TensorSharedHandle(tensor) for tensor in tensors]
    assert all(tensor.is_shared() for tensor in tensors)
    assert [tensor.data_ptr() for tensor in tensors] == where
    assert handles[0].get_tensor().data_ptr() == where[0]
    client.close()


def test_memory_that_others_see_is_not_moved():
    """A numpy array would go on showing the old place."""
    array = np.zeros((2, PAGES, PAGE, HEADS, HEAD), dtype=np.float32)
    tensors = [torch.from_numpy(array), torch.zeros(array.shape)]
    view = tensors[1].numpy()
    client = KVTPClient("ipc://@nobody", 0, 0)
    client.register_to_server(tensors, layout())
    assert tensors[0].data_ptr() == array.ctypes.data
    assert tensors[1].data_ptr() == view.ctypes.data
    client.close()


def test_a_registered_tensor_is_never_moved(monkeypatch):
    monkeypatch.setattr("flexkv.common.memory_handle.os.statvfs",
                        lambda path: types.SimpleNamespace(f_bavail=0, f_frsize=4096))
    tensors = [torch.zeros(2, PAGES, PAGE, HEADS, HEAD) for _ in range(LAYERS)]
    client = KVTPClient("ipc://@nobody", 0, 0)
    client.register_to_server(tensors, layout())    # no room in /dev/shm: it stays where it is
    where = tensors[0].data_ptr()
    with pytest.raises(ValueError, match="share_memory_"):
        TensorSharedHandle(tensors[0])
    assert tensors[0].data_ptr() == where
    client.close()
    assert TensorSharedHandle(tensors[0]).get_tensor().is_shared()


def send_tensor(conn):
    handle = conn.recv()
    handle.get_tensor()[3:] = 7
    conn.send("done")
    conn.recv()


def test_a_handle_is_the_same_memory_elsewhere():
    tensor = torch.zeros(5)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=send_tensor, args=(theirs,), daemon=True)
    process.start()
    ours.send(TensorSharedHandle(tensor))
    assert ours.poll(60) and ours.recv() == "done"
    assert tensor.tolist() == [0, 0, 0, 7, 7]
    ours.send("end")
    process.join()


@pytest.mark.parametrize("what", ["text", None, 3])
def test_what_is_no_tensor(what):
    with pytest.raises(ValueError, match="tensor"):
        TensorSharedHandle(what)


# ---- the connector ----

def cache_pool(seed):
    generator = torch.Generator().manual_seed(seed)

    def buffers():
        return [torch.randn(PAGES * PAGE, HEADS, HEAD, generator=generator)
                for _ in range(LAYERS)]

    return types.SimpleNamespace(k_buffer=buffers(), v_buffer=buffers())


class Pool(types.SimpleNamespace):
    """As SGLang's: asks the counter before it hands a layer out."""

    counter = None

    def register_layer_transfer_counter(self, counter):
        self.counter = counter

    def forward(self, pages):
        """A forward pass over pages: what it reads, K and V of each layer."""
        seen = []
        for layer in range(LAYERS):
            for buffer in (self.k_buffer, self.v_buffer):
                self.counter.wait_until(layer)
                seen.append(buffer[layer][slots(pages)].clone())
        return seen[0::2] + seen[1::2]


def layered_pool(seed):
    return Pool(**vars(cache_pool(seed)))


def connector_of(pool, rank, size, group):
    model = types.SimpleNamespace(num_hidden_layers=LAYERS, head_dim=HEAD, dtype=torch.float32,
                                  get_total_num_kv_heads=lambda: HEADS * size)
    args = types.SimpleNamespace(tp_size=size, pp_size=1, dp_size=1, nnodes=1, node_rank=0,
                                 enable_dp_attention=False, kv_cache_dtype="auto",
                                 model_path="test/model")
    return FlexKVConnector(sgl_model_config=model, server_args=args, page_size=PAGE, kvcache=pool,
                           tp_rank=rank, dp_rank=None, pp_rank=0, attn_cp_rank=0,
                           attn_tp_group=group)


def slots(pages):
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).reshape(-1)


def rows(pool, pages):
    return [buffer[slots(pages)].clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]


def store_and_load(connector, pool, check_completed=None):
    """What a request does; on every rank alike."""
    tokens = list(range(5 * PAGE + 2))
    before = rows(pool, [1, 2, 3, 4, 5])
    here = torch.cat([slots([1, 2, 3, 4, 5]), torch.tensor([79, 78])])
    assert connector.lookup_kv(tokens, torch.ones(len(tokens), dtype=torch.bool), "r0")[1] == 0
    assert connector.store_kv("r1", tokens, here) >= 0
    wait_until(lambda: connector.check_completed_stores() == ["r1"], what="the store")
    assert connector.store_kv("r2", tokens, here) == -1
    mask = torch.ones(len(tokens), dtype=torch.bool)
    mask[:PAGE] = False
    task, hit = connector.lookup_kv(tokens, mask, rid="r3", sglang_req_id="q")
    assert hit == 4 * PAGE and task >= 0
    again, hit = connector.lookup_kv(tokens, mask, rid="r3")
    assert again != task
    assert connector.retrieve_kv("r3", slots([10, 9, 12, 11])) == 4 * PAGE
    after = rows(pool, [10, 9, 12, 11])
    assert all(torch.equal(a, b[PAGE:]) for a, b in zip(after, before, strict=True))
    assert connector.retrieve_kv("r3", slots([13])) == 0
    other = connector.lookup_kv(tokens, mask, "r4", namespace=["salt"])
    assert other[1] == 0
    connector.lookup_kv(tokens, mask, "r5")
    connector.release_pending("r5")
    longer = tokens[:5 * PAGE] + list(range(500, 500 + 2 * PAGE))
    connector.store_kv("r6", longer, slots([1, 2, 3, 4, 5, 6, 7]))
    assert connector.wait_store("r6") and connector.wait_store("r6")
    connector.lookup_kv(longer, torch.ones(7 * PAGE, dtype=torch.bool), "r7")
    expected = rows(pool, [1, 2, 3, 4, 5, 6, 7])
    assert connector.retrieve_kv("r7", slots([13, 14, 15, 16, 17, 18, 19])) == 7 * PAGE
    assert all(map(torch.equal, rows(pool, [13, 14, 15, 16, 17, 18, 19]), expected))
    assert connector.sync_ready_store_rids(["x"]) == ["x"]
    with contextlib.suppress(ValueError):
        connector.store_kv("bad", [1, 2], slots([1]))
        raise AssertionError("as many slots as tokens are wanted")
    connector.reset()
    assert connector.lookup_kv(tokens, mask, "r8")[1] == 0


@pytest.fixture
def address(monkeypatch):
    name = f"ipc://@flexkv-sglang-{os.getpid()}"
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", name)
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "1M")
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "CRITICAL")
    monkeypatch.setattr("flexkv.common.env.GLOBAL_CONFIG_FROM_ENV.server_recv_port", name)


def test_one_rank(address):
    pool = cache_pool(1)
    connector = connector_of(pool, 0, 1, None)
    store_and_load(connector, pool)
    assert connector.enable_layerwise is False
    FlexKVHostReleaseShim(connector).destroy()
    connector.shutdown()


def test_prefetch(address, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "4M")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(tmp_path / "ssd"))
    pool = cache_pool(1)
    connector = connector_of(pool, 0, 1, None)
    tokens = list(range(3 * PAGE))
    connector.store_kv("r1", tokens, slots([1, 2, 3]))
    assert connector.wait_store("r1")
    assert connector.prefetch_async("r2", tokens) >= 0
    wait_until(lambda: connector.check_prefetch_progress("r2"), what="the prefetch")
    assert connector.check_prefetch_progress("r2")
    connector.prefetch_async("r3", tokens)
    connector.cancel_prefetch("r3")
    connector.shutdown()


def run_rank(rank, size, port, conn, use=None):
    import torch.distributed as dist
    sys.modules["sglang"] = None                    # its groups are not made here
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    pool = layered_pool(rank)
    connector = connector_of(pool, rank, size, dist.group.WORLD)
    (use or store_and_load)(connector, pool)
    dist.barrier()
    connector.shutdown()
    conn.send("done")


def test_ranks_follow_the_first(address):
    run_ranks(2)


def run_ranks(size, use=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=run_rank, args=(rank, size, port, theirs, use),
                                daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        for _, conn in ranks:
            assert conn.poll(120) and conn.recv() == "done"
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


# ---- layer by layer ----

def test_what_each_layer_is():
    """Regions of a layer come together; with a second cache for each layer, all with the last."""
    keys, values = ([torch.zeros(PAGES * PAGE, HEADS, HEAD) for _ in range(LAYERS)] for _ in "kv")
    groups = [([*keys, *values], layout())]
    regions, counts = layered_regions(groups)
    assert counts == [2] * LAYERS and regions == group_regions(groups)
    assert regions[1][0] == values[0].data_ptr()
    index = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, PAGES, 1, 1, 24, kv_dim=1)
    groups.append(([torch.zeros(PAGES, 24) for _ in range(LAYERS)], index))
    regions, counts = layered_regions(groups)
    assert counts == [3 * LAYERS] + [0] * (LAYERS - 1) and regions == group_regions(groups)


@pytest.fixture
def in_layers(address, monkeypatch):
    monkeypatch.setattr("flexkv.common.env.GLOBAL_CONFIG_FROM_ENV.enable_layerwise_transfer", True)
    monkeypatch.setenv("FLEXKV_ENABLE_LAYERWISE_TRANSFER", "1")
    monkeypatch.setenv("FLEXKV_LAYERWISE_EVENTFD_SOCKET", f"/tmp/flexkv-test-{os.getpid()}.sock")


def test_our_connector_in_layers(in_layers):
    pool = layered_pool(1)
    connector = connector_of(pool, 0, 1, None)
    assert connector.enable_layerwise
    connector.register_layer_transfer_counter(pool)
    tokens = list(range(5 * PAGE))
    mask = torch.ones(len(tokens), dtype=torch.bool)
    before = rows(pool, [1, 2, 3, 4, 5])
    connector.store_kv("r1", tokens, slots([1, 2, 3, 4, 5]))
    assert connector.wait_store("r1")
    pool.forward([1])                               # nothing to wait for
    for number, pages in enumerate([[10, 9, 12, 11, 8], [13, 14, 15, 16, 17]]):
        assert connector.lookup_kv(tokens, mask, "r2")[1] == 5 * PAGE
        loaded, producer = connector.start_load_kv_layerwise("r2", slots(pages))
        assert (loaded, producer) == (5 * PAGE, number + 1)
        assert all(map(torch.equal, pool.forward(pages), before))
    assert connector.start_load_kv_layerwise("r2", slots([1])) == (0, -1)
    connector.drain_launched_loads(threshold=1)
    assert connector._launched == []
    connector.shutdown()


def load_in_layers(connector, pool):
    tokens = list(range(5 * PAGE))
    mask = torch.ones(len(tokens), dtype=torch.bool)
    before = rows(pool, [1, 2, 3, 4, 5])
    connector.register_layer_transfer_counter(pool)
    connector.store_kv("r1", tokens, slots([1, 2, 3, 4, 5]))
    assert connector.wait_store("r1")
    assert connector.lookup_kv(tokens, mask, "r2")[1] == 5 * PAGE
    assert connector.start_load_kv_layerwise("r2", slots([13, 14, 15, 16, 17]))[0] == 5 * PAGE
    assert all(map(torch.equal, pool.forward([13, 14, 15, 16, 17]), before))


def test_ranks_in_layers(in_layers):
    run_ranks(2, load_in_layers)


def test_what_was_not_loaded_is_not_handed_out(in_layers):
    pool = layered_pool(1)
    connector = connector_of(pool, 0, 1, None)
    connector.register_layer_transfer_counter(pool)
    connector._counter._timeout_ms = 50
    connector._counter.begin(12345)                 # a load that no agent has begun
    with pytest.raises(RuntimeError, match="layer 0 was not loaded"):
        pool.forward([1])
    connector.reset()
    pool.forward([1])
    connector.shutdown()


def test_ssd_blocks_are_in_memory_before_they_hit(in_layers, monkeypatch, tmp_path):
    """Once the engine waits for layers, a block that can't be read would be too late."""
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "4M")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(tmp_path / "ssd"))
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "40K")        # ten blocks, as the SSD rounds them
    pool = layered_pool(1)
    connector = connector_of(pool, 0, 1, None)
    connector.register_layer_transfer_counter(pool)
    before = rows(pool, [1, 2, 3, 4])
    for number in range(4):                         # more than the CPU tier holds
        tokens = [number] * (4 * PAGE)
        assert connector.store_kv(number, tokens, slots([1, 2, 3, 4])) >= 0
        assert connector.wait_store(number)
        connector.kv_manager.kv_task_engine._node.wait_idle(50, 10000)
    mask = torch.ones(4 * PAGE, dtype=torch.bool)
    assert connector.lookup_kv([0] * (4 * PAGE), mask, "r")[1] == 4 * PAGE
    task = connector.kv_manager.kv_task_engine.tasks[connector._lookups["r"]]
    match = task.namespace.match(task.keys)
    assert (match.cpu_blocks, match.ssd_blocks) == (4, 0)
    assert connector.start_load_kv_layerwise("r", slots([10, 11, 12, 13]))[0] == 4 * PAGE
    assert all(map(torch.equal, pool.forward([10, 11, 12, 13]), before))
    connector.shutdown()


# ---- SGLang's own connector, where SGLang can be imported (docs/python_api.md says how) ----

class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Of a package that SGLang imports, and nothing here uses: anything by any name."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: unittest.mock.MagicMock()
        return module

    def exec_module(self, module):
        pass


def real_connector(pool):
    """0.5.23's, with the groups of one rank."""
    import transformers     # noqa: F401  before the stand-in
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, StandIn())
    from sglang.srt.mem_cache.storage.flexkv import flexkv_comm, flexkv_connector
    flexkv_comm.get_parallel = lambda: types.SimpleNamespace(
        world_group=types.SimpleNamespace(cpu_group=None))
    model = types.SimpleNamespace(num_hidden_layers=LAYERS, head_dim=HEAD, dtype=torch.float32,
                                  get_total_num_kv_heads=lambda: HEADS)
    args = types.SimpleNamespace(tp_size=1, pp_size=1, dp_size=1, nnodes=1, node_rank=0,
                                 enable_dp_attention=False, kv_cache_dtype="auto",
                                 model_path="test/model")
    # It looks every ten seconds only whether all are there.
    flexkv_connector.FlexKVConnector._wait_kv_manager_ready.__defaults__ = (0.05,)
    return flexkv_connector.FlexKVConnector(
        sgl_model_config=model, server_args=args, page_size=PAGE, kvcache=pool, tp_rank=0,
        dp_rank=None, pp_rank=0, attn_cp_rank=0)


@pytest.fixture
def sglang():
    pytest.importorskip("sglang", reason="SGLang is not installed")


def store_with(connector, handle, tokens, where):
    assert connector.store_kv(handle, tokens, where) >= 0
    wait_until(lambda: connector.check_completed_stores() == [handle], what="the store")


def test_sglangs_connector_in_layers(in_layers, sglang):
    pool = layered_pool(1)
    connector = real_connector(pool)
    connector.register_layer_transfer_counter(pool)
    assert pool.counter is connector.layer_done_counter
    tokens = list(range(5 * PAGE))
    mask = torch.ones(len(tokens), dtype=torch.bool)
    before = rows(pool, [1, 2, 3, 4, 5])
    store_with(connector, "r1", tokens, slots([1, 2, 3, 4, 5]))
    for round_ in range(7):                         # its counters are used in turn
        pages = [[10, 9, 12, 11, 8], [13, 14, 15, 16, 17]][round_ % 2]
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slots(pages)] = -1
        assert connector.lookup_kv(tokens, mask, "r2")[1] == 5 * PAGE
        loaded, producer = connector.start_load_kv_layerwise("r2", slots(pages))
        assert (loaded, producer) == (5 * PAGE, round_ % 3)
        assert all(map(torch.equal, pool.forward(pages), before))
    connector.shutdown()
    connector.tp_client.close()                     # it is left to the end of the process


def test_sglangs_forward_pass_fails_with_its_load(in_layers, sglang):
    """It has no way to be told; its own descriptors of the eventfds can't be read any more."""
    pool = layered_pool(1)
    connector = real_connector(pool)
    connector.register_layer_transfer_counter(pool)
    tokens = list(range(5 * PAGE))
    mask = torch.ones(len(tokens), dtype=torch.bool)
    store_with(connector, "r1", tokens, slots([1, 2, 3, 4, 5]))
    assert connector.lookup_kv(tokens, mask, "r2")[1] == 5 * PAGE
    agent = connector.tp_client.agent
    for high in range(1, 64):                       # whatever the operation's number will be
        agent.revoke([high << 32 | low for low in range(64)])
    connector.start_load_kv_layerwise("r2", slots([10, 9, 12, 11, 8]))
    with pytest.raises(OSError, match="Input/output"):
        pool.forward([10, 9, 12, 11, 8])
    connector.shutdown()
    connector.tp_client.close()                     # it is left to the end of the process
