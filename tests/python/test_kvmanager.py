"""KVManager and KVTPClient: put, get, the life of a task."""
import json
import time

import pytest
from conftest import stopped

np = pytest.importorskip("numpy")

from kvmanager_rig import (clean_pages, engine, HEAD, LAYERS, make_engine, PAGES,  # noqa: F401
                           prompt, quiet, SHAPES, slots_of, TOKENS, tokens_of)

from flexkv.common.request import KVResponseStatus as Status


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
    with stopped(engine.workers[1].process.pid):
        manager.launch(task, slots_of([2, 3]))
        start = time.monotonic()
        assert manager.wait(task, timeout=0.3)[task].status is Status.TIMEOUT
        assert 0.3 <= time.monotonic() - start < 2
        assert manager.try_wait(task) == {}
        with pytest.raises(ValueError, match="launched already"):
            manager.launch(task, slots_of([2, 3]))
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
