"""What the tests of KVManager and KVTPClient share: a real node, with worker processes of their own.

Tensors are numpy arrays over files that worker and test map, dressed up as what KVTPClient asks of a
tensor; so every byte of the workers' pages can be set and checked here, and torch is not needed.
"""
import contextlib
import os
import types
from multiprocessing import get_context

import pytest
from conftest import new_address, wait_until

np = pytest.importorskip("numpy")

from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig, RankInfo
from flexkv.common.rank import note_rank
from flexkv.common.request import KVResponseStatus as Status
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

TOKENS = 16             # per block
PAGES = 24
LAYERS, HEADS, HEAD = 2, 4, 6
UNTOUCHED = 0xEE
SPAWN = get_context("spawn")


# ---- a worker and its memory ----

class FakeTensor:
    """As much of a CPU tensor as KVTPClient looks at; int16 elements."""

    device = types.SimpleNamespace(type="cpu")

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def element_size(self):
        return self.array.itemsize

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def is_shared(self):
        return True

    def untyped_storage(self):
        return self


class Shape:
    """How an engine lays out its cache: the tensors' shapes, and where a block's K or V is."""

    def __init__(self, name, kind, kv=2, heads=HEADS, layers=LAYERS):
        self.name, self.kind, self.kv, self.heads, self.layers = name, kind, kv, heads, layers

    def layout(self):
        return KVCacheLayout(self.kind, self.layers, PAGES, TOKENS, self.heads, HEAD,
                             kv_dim=self.kv, num_kv_heads=self.heads)

    def shapes(self):
        page = (TOKENS, self.heads, HEAD)
        return {
            "first": [(self.kv, PAGES, *page)] * self.layers,
            "block": [(PAGES, self.kv, *page)] * self.layers,
            "whole": [(PAGES, self.layers, self.kv, *page)],
            "split": [(PAGES * TOKENS, self.heads, HEAD)] * (self.layers * self.kv),
            "latent": [(PAGES, TOKENS, HEAD)] * self.layers,
            "packed": [(PAGES, *page)] * self.layers,
        }[self.name]

    def tensors(self, arrays):
        if self.name == "packed":       # B H T D to the eye, token-major in memory
            return [FakeTensor(a.transpose(0, 2, 1, 3)) for a in arrays]
        return [FakeTensor(a) for a in arrays]

    def page(self, arrays, layer, kv, page):
        """The bytes of a page, as one row that can be written."""
        part = {
            "first": lambda: arrays[layer][kv, page],
            "block": lambda: arrays[layer][page, kv],
            "whole": lambda: arrays[0][page, layer, kv],
            "split": lambda: arrays[kv * self.layers + layer][page * TOKENS:(page + 1) * TOKENS],
            "latent": lambda: arrays[layer][page],
            "packed": lambda: arrays[layer][page],
        }[self.name]()
        assert part.flags.c_contiguous
        return part.reshape(-1).view(np.uint8)


FIRST = Shape("first", KVCacheLayoutType.LAYERFIRST)
SHAPES = [FIRST, Shape("block", KVCacheLayoutType.LAYERBLOCK),
          Shape("whole", KVCacheLayoutType.BLOCKFIRST),
          Shape("split", KVCacheLayoutType.LAYERFIRST),
          Shape("latent", KVCacheLayoutType.LAYERFIRST, kv=1, heads=1),
          Shape("packed", KVCacheLayoutType.LAYERFIRST, kv=1)]


def map_memory(path, shape, mode):
    arrays, offset = [], 0
    for dims in shape.shapes():
        arrays.append(np.memmap(path, np.int16, mode, offset, dims))
        offset += arrays[-1].nbytes
    return arrays


def run_worker(port, path, shape, dp_client_id, worker, rank_info, conn):
    if rank_info is not None:
        note_rank(rank_info)
    client = KVTPClient(port, dp_client_id, worker, intra_client_id=worker)
    client.register_to_server(shape.tensors(map_memory(path, shape, "r+")), shape.layout())
    conn.send("registered")
    with contextlib.suppress(EOFError):
        conn.recv()             # until the test lets go of it


class Worker:
    def __init__(self, path, port, shape, dp_client_id, worker, data_rank, rank_info=None):
        self.path, self.shape, self.data_rank = path, shape, data_rank
        size = sum(int(np.prod(dims)) * 2 for dims in shape.shapes())
        path.write_bytes(bytes([UNTOUCHED]) * size)
        self.arrays = map_memory(path, shape, "r+")
        self.args = (port, path, shape, dp_client_id, worker, rank_info)
        self.start()

    def start(self):
        self.conn, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=run_worker, args=(*self.args, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.conn.poll(30) and self.conn.recv() == "registered"

    def kill(self):
        self.process.kill()
        self.process.join()

    def _parts(self, block):
        """What a block's pages hold on this rank."""
        for layer in range(self.shape.layers):
            for kv in range(self.shape.kv):
                rng = np.random.default_rng([block, self.data_rank, layer, kv])
                yield layer, kv, rng.integers(0, 256, TOKENS * self.shape.heads * HEAD * 2,
                                              dtype=np.uint8)

    def fill(self, page, block):
        for layer, kv, expected in self._parts(block):
            self.shape.page(self.arrays, layer, kv, page)[:] = expected

    def holds(self, page, block):
        return all(np.array_equal(self.shape.page(self.arrays, layer, kv, page), expected)
                   for layer, kv, expected in self._parts(block))

    def spoil(self):
        for array in self.arrays:
            array.view(np.uint8)[...] = UNTOUCHED

    def is_untouched(self, page):
        return all((self.shape.page(self.arrays, layer, kv, page) == UNTOUCHED).all()
                   for layer in range(self.shape.layers) for kv in range(self.shape.kv))


# ---- an engine: a manager and its workers ----

class Engine:
    def __init__(self, folder, address, shape=FIRST, dp_client_id=0, model=None, noted=False,
                 collector=None, **cache):
        heads = shape.heads
        sizes = {"tp_size": 1, "pp_size": 1, **(model or {})}
        if heads > 1:
            heads *= sizes["tp_size"]
        self.model = ModelConfig(num_layers=shape.layers * sizes["pp_size"], num_kv_heads=heads,
                                 head_size=HEAD, kv_dim=shape.kv, dtype="int16", **sizes)
        self.cache = CacheConfig(tokens_per_block=TOKENS, **{"num_cpu_blocks": 64, **cache})
        if noted:
            note_rank(RankInfo(self.model))
        self.manager = KVManager(self.model, self.cache, dp_client_id, server_recv_port=address,
                                 event_collector=collector)
        self.manager.start()
        self.workers = []
        folder.mkdir(exist_ok=True)
        for i in range(self.model.workers_per_client):
            stage, rank = divmod(i, sizes["tp_size"])
            info = RankInfo(self.model, tp_rank=rank, pp_rank=stage) if noted else None
            data_rank = stage if heads == 1 else i      # ranks of one head hold the same
            self.workers.append(Worker(folder / f"worker{i}", self.manager.gpu_register_port,
                                       shape, dp_client_id, i, data_rank, info))
        wait_until(self.manager.is_ready, what="readiness")

    def close(self):
        self.manager.shutdown()
        for worker in self.workers:
            worker.kill()
        note_rank(None)

    def fill(self, pages, blocks):
        for worker in self.workers:
            for page, block in zip(pages, blocks, strict=True):
                worker.fill(page, block)

    def put(self, blocks, pages, **more):
        """Stores a prompt; the engine's pages are spoiled afterwards."""
        self.fill(pages, blocks)
        task = self.manager.put_async(tokens_of(blocks), slots_of(pages), **more)
        response = self.manager.wait(task)[task]
        assert response.status is Status.SUCCESS
        for worker in self.workers:
            worker.spoil()
        return response.return_mask

    def get(self, blocks, pages, **more):
        """How many of the blocks could be loaded. Checks every byte of every page."""
        task, mask = self.manager.get_match(tokens_of(blocks), **more)
        hits = int(mask.sum()) // TOKENS
        assert mask[:hits * TOKENS].all() and mask.size == len(blocks) * TOKENS
        self.manager.launch(task, slots_of(pages[:hits]))
        response = self.manager.wait(task)[task]
        assert response.status is Status.SUCCESS and np.array_equal(response.return_mask, mask)
        self.check(blocks[:hits], pages[:hits])
        return hits

    def check(self, blocks, pages):
        for worker in self.workers:
            for page in range(PAGES):
                if page in pages:
                    assert worker.holds(page, blocks[pages.index(page)]), (page, worker.path)
                else:
                    assert worker.is_untouched(page), (page, worker.path)


def tokens_of(blocks):
    """Blocks are known by number: the tokens follow from it."""
    return np.concatenate([np.arange(TOKENS, dtype=np.int64) * 3 + block * 1009 for block in blocks])


def slots_of(pages):
    pages = np.asarray(pages, dtype=np.int64)
    return (pages[:, None] * TOKENS + np.arange(TOKENS)).reshape(-1)


@pytest.fixture(scope="session", autouse=True)
def quiet():
    os.environ["FLEXKV_LOG_LEVEL"] = "CRITICAL"     # of the nodes, and of the workers' Python


@pytest.fixture
def make_engine(tmp_path):
    engines = []

    def make(**options):
        folder = tmp_path / f"engine{len(engines)}"
        engines.append(Engine(folder, options.pop("address", None) or new_address(), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One for all tests that need not have their own; each uses blocks of its own."""
    engine = Engine(tmp_path_factory.mktemp("engine"), new_address(), model={"tp_size": 2})
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def clean_pages(request):
    if "engine" in request.fixturenames:
        for worker in request.getfixturevalue("engine").workers:
            worker.spoil()


_first = iter(range(0, 10**9, 1000))


def prompt(n):
    first = next(_first)
    return list(range(first, first + n))


@pytest.fixture
def daemon_mode(monkeypatch):
    monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_client_mode", True)
