"""The SGLang connector on CPU tensors, with ranks that are processes and talk over gloo; and tensors
of torch in general. SGLang itself is not needed: its cache pool is a list of tensors here."""
import contextlib
import os
import socket
import types
from multiprocessing import get_context

import pytest
from conftest import wait_until

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from flexkv.common.memory_handle import TensorSharedHandle
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.integration.sglang.connector import FlexKVConnector, FlexKVHostReleaseShim
from flexkv.server.client import KVTPClient

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


def run_rank(rank, size, port, conn):
    import torch.distributed as dist
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    pool = cache_pool(rank)
    connector = connector_of(pool, rank, size, dist.group.WORLD)
    store_and_load(connector, pool)
    dist.barrier()
    connector.shutdown()
    conn.send("done")


def test_ranks_follow_the_first(address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=run_rank, args=(rank, 2, port, theirs), daemon=True)
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
