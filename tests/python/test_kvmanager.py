"""KVManager and KVTPClient over a real node, with worker processes of their own.

Tensors are numpy arrays over files that worker and test map, dressed up as what KVTPClient asks of a
tensor; so every byte of the workers' pages can be set and checked here, and torch is not needed.
"""
import contextlib
import errno
import json
import os
import signal
import subprocess
import time
import types
from multiprocessing import get_context

import pytest
from conftest import wait_until

np = pytest.importorskip("numpy")

import flexkv
from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig, RankInfo
from flexkv.common.rank import note_rank
from flexkv.common.request import KVResponseStatus as Status
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient
from flexkv.program import find_program

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


def process_state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


_next_address = iter(range(10**6))


def new_address():
    return f"ipc://@flexkv-test-{os.getpid()}-{next(_next_address)}"


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


# ---- put, get ----

def test_put_and_get_into_other_pages(engine):
    blocks = prompt(5)
    assert engine.get(blocks, []) == 0
    assert engine.put(blocks, [3, 1, 4, 15, 9]).all()
    assert engine.get(blocks, [2, 6, 5, 20, 8]) == 5


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_layouts(make_engine, shape):
    engine = make_engine(shape=shape, model={"tp_size": 1})
    blocks = prompt(6)
    engine.put(blocks, [0, 1, 2, 7, 22, 23])
    assert engine.get(blocks, [11, 10, 9, 23, 0, 5]) == 6


@pytest.mark.parametrize("sizes", [{"tp_size": 2, "pp_size": 2}, {"pp_size": 2}], ids=str)
def test_ranks_hold_slices_of_one_block(make_engine, sizes):
    engine = make_engine(model=sizes)
    blocks = prompt(4)
    engine.put(blocks, [0, 1, 2, 3])
    assert engine.get(blocks, [7, 8, 5, 4]) == 4


@pytest.mark.parametrize("noted", [False, True])
def test_ranks_with_the_same_kv(make_engine, noted):
    """Where the adapter has said who is who, the ranks store it once."""
    engine = make_engine(shape=SHAPES[4], model={"tp_size": 3}, noted=noted)
    blocks = prompt(7)
    engine.put(blocks, list(range(7)))
    space, = json.loads(engine.manager.kv_task_engine._node.status())["spaces"]
    page_bytes = TOKENS * HEAD * 2 * LAYERS
    assert (space["ranks"], space["slice_bytes"]) == (1 if noted else 3, page_bytes)
    assert engine.get(blocks, list(range(10, 17))) == 7


def test_only_the_longest_known_prefix_is_loaded(engine):
    blocks = prompt(4)
    engine.put(blocks, [0, 1, 2, 3])
    assert engine.get([*blocks[:2], 999_999, blocks[3]], [4, 5, 6, 7]) == 2


def test_what_the_engine_has_is_not_loaded(engine):
    blocks = prompt(4)
    engine.put(blocks, [0, 1, 2, 3])
    token_mask = np.ones(4 * TOKENS, dtype=bool)
    token_mask[:2 * TOKENS] = False
    task, mask = engine.manager.get_match(tokens_of(blocks), token_mask)
    assert not mask[:2 * TOKENS].any() and mask[2 * TOKENS:].all()
    engine.manager.launch(task, slots_of([8, 9]))
    assert engine.manager.wait(task)[task].status is Status.SUCCESS
    engine.check(blocks[2:], [8, 9])


def test_a_mapping_of_the_whole_prompt_is_understood(engine):
    blocks = prompt(4)
    engine.put(blocks[:2], [0, 1])
    engine.fill([4, 5, 6, 7], blocks)
    task, mask = engine.manager.put_match(tokens_of(blocks))
    assert not mask[:2 * TOKENS].any() and mask[2 * TOKENS:].all()
    engine.manager.launch(task, slots_of([4, 5, 6, 7]))
    assert engine.manager.wait(task)[task].status is Status.SUCCESS
    for worker in engine.workers:
        worker.spoil()
    assert engine.get(blocks, [20, 21, 22, 23]) == 4


def test_a_mapping_of_what_is_new(engine):
    blocks = prompt(4)
    engine.put(blocks[:2], [0, 1])
    engine.fill([6, 7], blocks[2:])
    task, _ = engine.manager.put_match(tokens_of(blocks))
    engine.manager.launch(task, slots_of([6, 7]))
    assert engine.manager.wait(task)[task].status is Status.SUCCESS
    for worker in engine.workers:
        worker.spoil()
    assert engine.get(blocks, [20, 21, 22, 23]) == 4


def test_put_of_known_blocks_is_done_at_once(engine):
    blocks = prompt(3)
    engine.put(blocks, [0, 1, 2])
    task, mask = engine.manager.put_match(tokens_of(blocks))
    assert not mask.any()
    assert engine.manager.wait(task, timeout=0)[task].status is Status.SUCCESS


def test_a_rest_that_fills_no_block_is_ignored(engine):
    blocks = prompt(2)
    tokens = np.concatenate([tokens_of(blocks), [5, 6, 7]])
    engine.fill([0, 1], blocks)
    task = engine.manager.put_async(tokens, np.concatenate([slots_of([0, 1]), [40, 41, 42]]))
    response = engine.manager.wait(task)[task]
    assert response.return_mask.sum() == 2 * TOKENS and response.return_mask.size == tokens.size
    task = engine.manager.put_async(np.arange(8), slots_of([0])[:8])
    response = engine.manager.wait(task)[task]
    assert response.status is Status.SUCCESS and not response.return_mask.any()


def test_lists_arrays_and_repeated_slots(engine):
    """Some engines write a page's first slot for each of its tokens."""
    blocks = prompt(2)
    engine.fill([3, 2], blocks)
    first_slots = np.repeat(np.array([3, 2], dtype=np.int32) * TOKENS, TOKENS)
    task = engine.manager.put_async(tokens_of(blocks).tolist(), first_slots.tolist(),
                                    token_mask=[True] * (2 * TOKENS))
    assert engine.manager.wait([task])[task].status is Status.SUCCESS
    for worker in engine.workers:
        worker.spoil()
    task, _ = engine.manager.get_match(tokens_of(blocks).astype(np.int32))
    assert engine.manager.launch([task], [slots_of([7, 6]).tolist()]) == [task]
    assert engine.manager.wait(task)[task].status is Status.SUCCESS
    engine.check(blocks, [7, 6])


def test_namespaces_are_apart(engine):
    blocks = prompt(3)
    engine.put(blocks, [0, 1, 2], namespace=["tenant", "lora"])
    assert engine.get(blocks, [], namespace=None) == 0
    assert engine.get(blocks, [], namespace=["tenantlora"]) == 0
    assert engine.get(blocks, [], namespace=["lora", "tenant"]) == 0
    assert engine.get(blocks, [5, 6, 7], namespace=["tenant", "lora"]) == 3
    other = prompt(2)
    engine.put(other, [0, 1], namespace=[])
    assert engine.get(other, [5, 6], namespace=None) == 2


# ---- the life of a task ----

def test_statuses_and_that_a_response_comes_once(engine):
    manager, blocks = engine.manager, prompt(2)
    engine.put(blocks, [0, 1])
    task, _ = manager.get_match(tokens_of(blocks))
    assert manager.wait(task, timeout=0.2)[task].status is Status.UNREADY
    assert manager.try_wait(task)[task].status is Status.UNREADY
    manager.launch(task, slots_of([2, 3]))
    assert manager.wait([task, 10**8])[10**8].status is Status.NOTFOUND
    assert manager.wait(task)[task].status is Status.NOTFOUND
    with pytest.raises(KeyError, match="not known"):
        manager.launch(task, slots_of([2, 3]))


def test_wait_gives_up_and_the_task_goes_on(engine):
    manager, blocks = engine.manager, prompt(2)
    engine.put(blocks, [0, 1])
    task, _ = manager.get_match(tokens_of(blocks))
    stopped = engine.workers[1].process.pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(stopped) == "T", what="the stop")
        manager.launch(task, slots_of([2, 3]))
        start = time.monotonic()
        assert manager.wait(task, timeout=0.3)[task].status is Status.TIMEOUT
        assert 0.3 <= time.monotonic() - start < 2
        assert manager.try_wait(task) == {}
        with pytest.raises(ValueError, match="launched already"):
            manager.launch(task, slots_of([2, 3]))
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert manager.wait(task)[task].status is Status.SUCCESS
    engine.check(blocks, [2, 3])


def test_batch(engine):
    manager, prompts = engine.manager, [prompt(2) for _ in range(3)]
    pages = [[0, 1], [2, 3], [4, 5]]
    tasks = []
    for blocks, where in zip(prompts, pages):
        engine.fill(where, blocks)
        tasks.append(manager.put_match(tokens_of(blocks))[0])
    batch, = manager.launch(tasks, [slots_of(where) for where in pages], as_batch=True)
    assert batch not in tasks
    assert manager.wait(tasks[0])[tasks[0]].status is Status.NOTFOUND
    response = manager.wait(batch, completely=True)[batch]
    assert response.status is Status.SUCCESS
    assert [int(mask.sum()) for mask in response.return_mask] == [2 * TOKENS] * 3
    for worker in engine.workers:
        worker.spoil()
    prompts.insert(1, prompt(2))        # a miss among them keeps its place
    tasks = [manager.get_match(tokens_of(blocks))[0] for blocks in prompts]
    where = [[10, 11], [12, 13], [14, 15], [16, 17]]
    batch, = manager.launch(tasks, [slots_of(w) for w in where], as_batch=True)
    response = manager.wait(batch)[batch]
    assert response.status is Status.SUCCESS
    assert [bool(mask.all()) for mask in response.return_mask] == [True, False, True, True]
    engine.check([b for i, p in enumerate(prompts) if i != 1 for b in p],
                 [10, 11, 14, 15, 16, 17])
    assert not manager.kv_task_engine.tasks and not manager.kv_task_engine.graph_to_task


def test_one_task_is_no_batch(engine):
    blocks = prompt(1)
    engine.put(blocks, [0])
    task, _ = engine.manager.get_match(tokens_of(blocks))
    assert engine.manager.launch([task], [slots_of([1])], as_batch=True) == [task]
    assert engine.manager.wait(task)[task].status is Status.SUCCESS


def test_cancel_before_launch_lets_go_of_the_blocks(engine):
    manager, blocks = engine.manager, prompt(2)
    engine.put(blocks, [0, 1])
    before = manager.kv_task_engine._node.stats()["leases"]
    task, _ = manager.get_match(tokens_of(blocks))
    assert manager.kv_task_engine._node.stats()["leases"] == before + 1
    manager.cancel(task)
    manager.cancel([task, 10**8])       # any number of times, known or not
    assert manager.kv_task_engine._node.stats()["leases"] == before
    assert manager.wait(task)[task].status is Status.NOTFOUND


def test_after_cancel_no_copy_touches_the_pages(make_engine):
    engine = make_engine()
    blocks = prompt(PAGES)
    engine.put(blocks, list(range(PAGES)))
    for _ in range(20):
        task, _ = engine.manager.get_match(tokens_of(blocks))
        engine.manager.launch(task, slots_of(list(range(PAGES))))
        engine.manager.cancel(task)
        engine.workers[0].spoil()
        assert all(engine.workers[0].is_untouched(page) for page in range(PAGES))
    assert not engine.manager.kv_task_engine.graph_to_task


@pytest.mark.parametrize("slots, message", [
    (slots_of([1, 2])[:-1], "31 entries"),
    (slots_of([1, 2]) + 1, "one whole page"),
    (slots_of([1, 2])[::-1], "one whole page"),
    (np.concatenate([slots_of([1])[:8], slots_of([2]), slots_of([1])[8:]]), "one whole page"),
    (slots_of([1, -1]), "negative"),
    (slots_of([1, PAGES]), "page"),
    (np.zeros(2 * TOKENS), "integers"),
], ids=["short", "shifted", "backwards", "mixed", "negative", "beyond", "float"])
def test_a_bad_slot_mapping_moves_nothing(engine, slots, message):
    blocks = prompt(2)
    engine.put(blocks, [0, 1])
    task, _ = engine.manager.get_match(tokens_of(blocks))
    with pytest.raises((ValueError, TypeError), match=message):
        engine.manager.launch(task, slots)
    engine.manager.cancel(task)
    engine.check([], [])


def test_bad_masks(engine):
    tokens, holes = tokens_of(prompt(2)), np.ones(2 * TOKENS, dtype=bool)
    holes[5] = False
    for mask, message in ((holes, "one run"), (np.ones(3, dtype=bool), "3 entries"),
                          (np.arange(2 * TOKENS) >= 4, "inside a block")):
        with pytest.raises(ValueError, match=message):
            engine.manager.get_match(tokens, mask)
    with pytest.raises(ValueError, match="first token"):
        engine.manager.put_match(tokens, np.arange(2 * TOKENS) >= TOKENS)
    with pytest.raises(ValueError, match="one dimension"):
        engine.manager.get_match(tokens.reshape(2, -1))


def test_reset_drops_everything(engine):
    blocks, held = prompt(2), prompt(2)
    engine.put(blocks, [0, 1])
    engine.put(held, [0, 1])
    task, _ = engine.manager.get_match(tokens_of(held))
    engine.manager.reset()
    assert engine.get(blocks, []) == 0
    assert engine.manager.wait(task)[task].status is Status.CANCELLED
    pool = engine.manager.kv_task_engine.cache_engine.cpu_cache_engine.mempool
    assert pool.num_free_blocks == pool.num_total_blocks == 64


def test_a_full_cache_stores_what_fits(make_engine):
    engine = make_engine(num_cpu_blocks=8)
    blocks = prompt(20)
    engine.fill(range(20), blocks)
    task, mask = engine.manager.put_match(tokens_of(blocks))
    assert mask.all()
    engine.manager.launch(task, slots_of(range(20)))
    response = engine.manager.wait(task)[task]
    stored = int(response.return_mask.sum()) // TOKENS
    assert response.status is Status.SUCCESS and 0 < stored <= 8
    assert mask.all(), "the mask of the match stays as it was"
    engine.workers[0].spoil()
    assert engine.get(blocks, list(range(stored))) == stored


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
    stopped = engine.workers[1].process.pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(stopped) == "T", what="the stop")
        manager.launch(task, slots_of([2, 3]))
        # The node gives the operation up after 0.3 s, and the worker a second later.
        assert manager.wait(task, timeout=2.5)[task].status is Status.TIMEOUT
        assert manager.kv_task_engine._busy
    finally:
        os.kill(stopped, signal.SIGCONT)
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
    os.kill(engine.workers[1].process.pid, signal.SIGSTOP)
    engine.manager.launch(task, slots_of([2, 3]))
    start = time.monotonic()
    engine.manager.shutdown()
    assert time.monotonic() - start < 10
    for each in (task, held):
        assert engine.manager.wait(each, timeout=1)[each].status in (Status.CANCELLED,
                                                                    Status.SUCCESS)
    os.kill(engine.workers[1].process.pid, signal.SIGCONT)


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

@pytest.fixture
def daemon_mode(monkeypatch):
    monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, "server_client_mode", True)


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
