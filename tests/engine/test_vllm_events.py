"""KV events: what a router makes of the engine's stream is what FlexKV has, whatever happens."""
import importlib.util
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

from test_vllm_sim import (STEPS, all_blocks_back, daemon, model, small_tiers,  # noqa: F401
                           start_daemon)
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm_sim import BLOCK, VOCAB, Engine, Setup, check_outputs, scenario

from flexkv import Error
from flexkv.integration.vllm import events as kv_events
from flexkv.integration.vllm import versions
from flexkv.integration.vllm.events import Events
from flexkv.integration.vllm.requests import Label
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

TIERS = ("CPU", "STORAGE")


class Router:
    """Believes what the stream says. What the engine itself says of a block (by its hash: parent,
    tokens, salt) FlexKV must say too."""

    def __init__(self) -> None:
        self.has: dict[str, set[int]] = {medium: set() for medium in ("GPU", *TIERS)}
        self.forgotten: dict[str, set[int]] = {medium: set() for medium in ("GPU", *TIERS)}
        self.blocks: dict[int, tuple[Any, ...]] = {}
        self.stored = self.removed = self.cleared = self.compared = 0

    def hear(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                self._stored(event)
            elif isinstance(event, BlockRemoved):
                self._removed(event)
            elif isinstance(event, AllBlocksCleared):
                self.cleared += 1
                for medium, has in self.has.items():
                    self.forgotten[medium] |= has
                    has.clear()

    def _stored(self, event: Any) -> None:
        assert event.block_size == BLOCK
        assert len(event.token_ids) == BLOCK * len(event.block_hashes)
        parent = event.parent_block_hash
        extra = event.extra_keys or [None] * len(event.block_hashes)
        assert len(extra) == len(event.block_hashes)
        for i, block in enumerate(event.block_hashes):
            meaning = (parent, tuple(event.token_ids[i * BLOCK:(i + 1) * BLOCK]), extra[i])
            assert self.blocks.setdefault(block, meaning) == meaning
            if event.medium in TIERS:
                assert block not in self.has[event.medium], "stored twice"
                self.stored += 1
                self.compared += block in self.has["GPU"]
            self.has[event.medium].add(block)
            parent = block

    def _removed(self, event: Any) -> None:
        for block in event.block_hashes:
            if event.medium in TIERS:
                self.removed += 1
                assert block in self.has[event.medium] | self.forgotten[event.medium]
            self.has[event.medium].discard(block)

    def agrees(self, engine: Engine) -> None:
        """Called when nothing is under way. What a new daemon has to say may still be on its way."""
        end = time.monotonic() + 30
        while True:
            self.hear(engine.scheduler.connector.take_events())
            stats = engine.node.stats()
            used = [stats[tier]["slots"] - stats[tier]["free_slots"] for tier in ("cpu", "ssd")]
            known = [len(self.has[medium]) for medium in TIERS]
            if known == used:
                return
            assert time.monotonic() < end, f"the router knows {known} blocks, there are {used}"
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMO_USE_FLEXKV", "1")


def live_with_events(setup: Setup, model: Path, seed: int,  # noqa: F811
                     disturb: Callable[[Engine, int], None] = lambda engine, step: None) -> Router:
    """As in test_vllm_sim.py; some requests have salts."""
    engine, router, rng = Engine(setup, model), Router(), random.Random(seed)
    engine.published = router.hear
    add = engine.add
    engine.add = lambda tokens, wanted: add(
        tokens, wanted, cache_salt=rng.choice((None, None, "dynamo-cache-salt:a", "dynamo-cache-salt:b")))
    try:
        prompts = scenario(engine, seed, STEPS, lambda step: disturb(engine, step))
        check_outputs(engine, prompts)
        assert all_blocks_back(engine)
        settle(engine)
        router.agrees(engine)
    finally:
        engine.close()
    assert router.stored > 50 and router.compared > 20
    return router


def at_rest(engine: Engine) -> bool:
    try:
        stats = engine.node.stats()
    except Error:               # its daemon was killed just now, and the new one is looked for
        return False
    return not stats["write_backlog_blocks"] and not stats["operations"]


def settle(engine: Engine) -> None:
    end = time.monotonic() + 30
    while not at_rest(engine):
        assert time.monotonic() < end, "the node does not come to rest"
        time.sleep(0.01)


def clear_engine(engine: Engine, step: int) -> None:
    """Its own cache alone, FlexKV's is not touched."""
    if step % 100 == 50:
        engine.drain()          # it can't be cleared while requests have blocks
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=False,
                                                   reset_connector=False)


SETUPS = {
    "ours": Setup(events=True),
    "upstream": Setup(events=True, kind="upstream"),
    "ours-overlap": Setup(events=True, overlap=True),
    "upstream-overlap": Setup(events=True, overlap=True, kind="upstream"),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_router_knows_what_is_there(name: str, seed: int, model: Path,  # noqa: F811
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "256K")
    router = live_with_events(SETUPS[name], model, seed)
    assert router.removed > 20


@pytest.mark.parametrize("name", SETUPS)
def test_cleared_engines_have_what_flexkv_has(name: str, model: Path) -> None:  # noqa: F811
    router = live_with_events(SETUPS[name], model, 3, clear_engine)
    assert router.cleared >= STEPS // 100


@pytest.mark.parametrize("name", SETUPS)
def test_with_ssd(name: str, model: Path, tmp_path: Path,  # noqa: F811
                  monkeypatch: pytest.MonkeyPatch) -> None:
    small_tier_and_ssd(monkeypatch, tmp_path)
    live_with_events(SETUPS[name], model, 4, clear_engine)


def small_tier_and_ssd(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "128K")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "16M")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(folder / "ssd"))


@pytest.mark.parametrize("kind", ["ours", "upstream"])
def test_restart(kind: str, model: Path, tmp_path: Path,  # noqa: F811
                 monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on SSD is announced with the first step."""
    small_tier_and_ssd(monkeypatch, tmp_path)
    router = Router()
    for run in range(2):
        before, router.has = router.has, Router().has
        engine = Engine(Setup(events=True, kind=kind), model)
        engine.published = router.hear
        try:
            if run:
                engine.add([VOCAB - 1], 1)
                engine.drain()
                assert len(before["STORAGE"]) > 30 and router.has["STORAGE"] == before["STORAGE"]
            else:
                for i in range(6):
                    engine.add([(i * 31 + k) % VOCAB for k in range(8 * BLOCK + 1)], 1,
                               cache_salt="dynamo-cache-salt:a" if i % 2 else None)
                    engine.drain()
                    settle(engine)          # blocks that the disk is too slow for stay off it
            settle(engine)
            router.agrees(engine)
        finally:
            engine.close()


def test_several_groups(model: Path) -> None:  # noqa: F811
    """Blocks of full attention only."""
    engine, router = Engine(Setup(windows=(0, 64), blocks=200, events=True), model), Router()
    stored: list[Any] = []
    engine.published = lambda events: stored.extend(
        e for e in events if isinstance(e, BlockStored) and e.medium in TIERS)
    try:
        if engine.scheduler.connector._scheduler is None:
            pytest.skip("with several KV groups caching is off in this vLLM")
        engine.add([i % VOCAB for i in range(10 * BLOCK + 3)], 1)
        engine.drain()
        engine.add([1], 1)
        engine.drain()
        router.hear(stored)
        assert len(router.has["CPU"]) == 10 and router.stored == 10
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["ours", "upstream"])
def test_daemon_killed(name: str, model: Path,  # noqa: F811
                       daemon: list[subprocess.Popen]) -> None:  # noqa: F811
    """What a new daemon does not have is taken back."""
    def disturb(engine: Engine, step: int) -> None:
        if step % 200 == 100:
            daemon[-1].kill()
            daemon[-1].wait()
            start_daemon(daemon)
    live_with_events(SETUPS[name], model, 5, disturb)
    assert len(daemon) > 2


@pytest.mark.parametrize("option", ["0", "1"])
def test_off_costs_nothing(option: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where one of the two sides does not want them."""
    monkeypatch.setenv("DYNAMO_USE_FLEXKV", option)
    engine = Engine(Setup(events=option == "0"), model)
    try:
        assert engine.scheduler.connector._scheduler._c.events is None
        engine.add([i % VOCAB for i in range(5 * BLOCK)], 1)
        engine.drain()
        assert engine.node.stats()["events"] == 0
        assert not list(engine.scheduler.connector.take_events())
    finally:
        engine.close()


# ---- without an engine -----------------------------------------------------------------------------

class Source:
    def __init__(self, *batches: list[tuple[Any, ...]]) -> None:
        self.batches, self.takes, self.again_calls = list(batches), 0, 0

    def take(self, most: int) -> list[tuple[Any, ...]]:
        self.takes += 1
        return self.batches.pop(0) if self.batches else []

    def again(self) -> None:
        self.again_calls += 1


def of(source: Source) -> Events:
    return Events(source, SimpleNamespace())


STORED = (True, "CPU", [1, 2], None, [5, 6, 7, 8], 2, None, None)


def test_nothing_new_is_one_call() -> None:
    source = Source()
    assert of(source).take(None) == [] and source.takes == 1


def test_a_step_does_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "SECONDS", -1)
    events = of(Source([STORED], [STORED]))
    assert len(events.take(None)) == 1 and len(events.take(None)) == 1
    assert not events.take(None)


def test_the_pool_shows_when_it_was_cleared() -> None:
    source = Source()
    events, pool = of(source), SimpleNamespace(cached_block_hash_to_block=object())
    for _ in range(3):
        events.take(pool)
    assert source.again_calls == 0
    pool.cached_block_hash_to_block = object()
    for _ in range(3):
        events.take(pool)
    assert source.again_calls == 1
    of(source).take(SimpleNamespace())      # a pool of another make


def test_salts_and_adapters_in_events() -> None:
    make = versions.EventMaker()
    root = make.event((True, "CPU", [1, 2], None, [5, 6, 7, 8], 2, "adapter", "salt"))
    assert root.extra_keys == [("salt",), None] and root.lora_name == "adapter"
    child = make.event((True, "STORAGE", [3], 2, [9, 9], 2, None, "salt"))
    assert (child.extra_keys, child.parent_block_hash, child.medium) == (None, 2, "STORAGE")
    gone = make.event((False, "CPU", [1], None, [], 0, None, None))
    assert isinstance(gone, BlockRemoved) and gone.medium == "CPU"


def test_events_of_older_engines() -> None:
    """What they can't say is not announced: a router would give it to the wrong requests."""
    class Old:
        __struct_fields__ = ("block_hashes", "parent_block_hash", "token_ids", "block_size",
                             "lora_id", "medium")

        def __init__(self, **fields: Any) -> None:
            assert set(fields) == set(self.__struct_fields__)

    make = versions.EventMaker(Old, BlockRemoved)
    assert isinstance(make.event(STORED), Old)
    assert make.fits(Label()) and not make.fits(Label("adapter")) and not make.fits(Label(None, "salt"))


def engine_request(**more: Any) -> Any:
    return SimpleNamespace(**({"lora_request": None, "cache_salt": None} | more))


def test_what_routers_cant_tell_apart_is_not_announced() -> None:
    events = of(Source())
    assert events.label(engine_request(), ()) == Label()
    assert events.label(engine_request(cache_salt="s"), ()) == Label(None, "s")
    lora = SimpleNamespace(lora_name="adapter")
    assert events.label(engine_request(lora_request=lora), ()) == Label("adapter", None)
    assert events.label(engine_request(mm_features=[1]), ()) is None
    assert events.label(engine_request(prompt_embeds=[1]), ()) is None
    assert events.label(engine_request(), ("tenant",)) is None


def test_the_connector_that_comes_with_vllm_gets_two_calls_more(
        monkeypatch: pytest.MonkeyPatch) -> None:
    base = versions.connector_base()

    class Plain(base):              # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            pass

    class Forwarding(Plain):
        def reset_cache(self) -> str:
            return "its own"

    for kind in (Plain, Forwarding):
        kind.__abstractmethods__ = frozenset()
        connector = kind()
        impl = object.__new__(FlexKVConnectorV1Impl)
        impl._scheduler = SimpleNamespace(reset=lambda: True, bind_pool=lambda pool: None)
        impl._put_on(connector)
        assert connector.reset_cache() == (True if kind is Plain else "its own")
        assert "bind_gpu_block_pool" in vars(connector)
    impl._put_on(None)              # made by somebody else
