"""Loads that are reported while they are on their way, on both sides of the connector, with a pretended
node and agents: when they are asked for, and which step waits. With real bytes: test_vllm_sim.py."""
import copy
import importlib.util
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

from test_vllm_parts import engine_config, kv_config, options, spec  # noqa: F401

from vllm.config import KVTransferConfig

from flexkv import EARLY
from flexkv.integration.vllm import scheduler
from flexkv.integration.vllm.protocol import StepMetadata
from flexkv.integration.vllm.worker import WorkerSide


class FakeNode:
    """Has every block, and keeps what gets were asked for with."""

    def __init__(self) -> None:
        self.gets: list[dict[str, Any]] = []
        self.ended: list[Any] = []

    def space(self, name: str, **more: Any) -> Any:
        return SimpleNamespace(namespace=lambda *parts: self)

    def keys_from_hashes(self, hashes: list[bytes]) -> bytes:
        return bytes(16 * len(hashes))

    def match(self, keys: bytes) -> Any:
        blocks = len(keys) // 16
        return SimpleNamespace(lease=1, blocks=blocks, cpu_blocks=blocks, peer_blocks=0)

    def get(self, lease: int, first: int, pages: list[int], **how: Any) -> int:
        self.gets.append(how)
        return len(self.gets)

    def end(self, op: int, flags: int) -> None:
        self.ended.append(SimpleNamespace(op=op, status=0, blocks_ok=2, flags=flags))

    def poll(self, most: int, timeout_ms: int) -> list[Any]:
        ended, self.ended = self.ended, []
        return ended

    def release(self, lease: int) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {"ssd": {"slots": 0}, "cpu": {"slots": 0}}


class Steps:
    """The scheduler's side, and an engine around it that loads two blocks at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Any, *groups: Any, full: bool = True,
                 **more: Any) -> None:
        self.node = FakeNode()
        self.sizes = [g.block_size for g in groups] or [32]
        monkeypatch.setattr(scheduler, "open_node", lambda *arguments: self.node)
        config = copy.copy(config)
        config.kv_transfer_config = KVTransferConfig(kv_connector="FlexKVConnectorV1",
                                                     kv_role="kv_consumer", engine_id="e")
        self.side = scheduler.SchedulerSide(config, kv_config(*groups) if groups else None,
                                            options("", **more), full=full)
        self.requests = 0
        self.load_one()             # known to the side: a step that computes has a request

    def load_one(self) -> dict[str, Any]:
        """What the get of a new request was asked for with."""
        self.requests += 1
        tokens = 2 * max(self.sizes)
        engine = SimpleNamespace(
            request_id=f"r{self.requests}", num_tokens=tokens + 1, num_computed_tokens=0,
            num_preemptions=0, block_hashes=[bytes(16)] * ((tokens + 1) // min(self.sizes)),
            lora_request=None, skip_reading_prefix_cache=False)
        assert self.side.matched_tokens(engine, 0)[0] == tokens
        tables = tuple([1 + i for i in range(tokens // size)] for size in self.sizes)
        self.side.allocated(engine, SimpleNamespace(get_block_ids=lambda: tables), tokens)
        return self.node.gets[-1]

    def make(self, computes: bool) -> StepMetadata:
        scheduled = {"r1": 1} if computes else {}
        return self.side.build_meta(SimpleNamespace(
            total_num_scheduled_tokens=len(scheduled), num_scheduled_tokens=scheduled,
            preempted_req_ids=None, kv_connector_block_state=SimpleNamespace()))

    def back(self, step: StepMetadata, fenced: bool) -> Any:
        output = SimpleNamespace(finished_recving=None, finished_sending=None)
        self.side.update(output, step.step, fenced)
        return output

    def step(self, computes: bool, fenced: bool) -> None:
        self.back(self.make(computes), fenced)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, engine_config: Any) -> Any:  # noqa: F811
    return lambda *groups, **more: Steps(monkeypatch, engine_config, *groups, **more)


def test_early_from_the_first_fenced_step_on(steps: Any) -> None:
    s = steps()
    assert s.node.gets == [{}], "nothing is known of the workers"
    s.step(computes=False, fenced=True)
    assert s.load_one() == {}, "steps that compute nothing say nothing"
    step = s.make(computes=True)
    assert s.load_one() == {}, "the step is not back"
    s.back(step, fenced=True)
    assert s.load_one() == {"early": True}
    s.step(computes=False, fenced=False)
    assert s.load_one() == {"early": True}
    s.step(computes=True, fenced=False)
    for _ in range(3):
        assert s.load_one() == {}
        s.step(computes=True, fenced=True)      # once is enough, for ever


def test_never_early_where_steps_are_not_fenced(steps: Any) -> None:
    s = steps()
    s.step(computes=True, fenced=False)
    s.step(computes=True, fenced=True)
    assert s.load_one() == {}


@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize("seen_in", ["make", "back"])
def test_arriving_goes_with_the_very_next_step(seen_in: str, computes: bool, steps: Any) -> None:
    """That is no later than any step in which the blocks can be somebody's."""
    s = steps()
    s.step(computes=True, fenced=True)
    s.load_one()
    s.load_one()
    under_way = s.make(computes=True)           # overlaps with what follows
    assert under_way.arriving == []
    s.node.end(2, EARLY)
    if seen_in == "back":
        assert s.back(under_way, True).finished_recving == {"r2"}
    s.node.end(3, 0)                            # this one is over: nothing to wait for
    step = s.make(computes)
    assert step.arriving == [2]
    assert pickle.loads(pickle.dumps(step)).arriving == [2]
    if seen_in == "make":
        assert s.back(under_way, True).finished_recving == {"r2", "r3"}
    assert s.make(True).arriving == []


def test_synchronous_loads_arrive_with_their_step(steps: Any) -> None:
    s = steps(sync_get=True)
    s.node.end(1, 0)
    s.step(computes=True, fenced=True)
    assert s.load_one() == {"early": True}
    s.node.end(2, EARLY)
    assert s.make(computes=True).arriving == [2]


@pytest.mark.parametrize("unfit", ["groups", "window", "layerwise"])
def test_where_loads_are_not_early(unfit: str, steps: Any) -> None:
    full, window = spec("FullAttentionSpec", 32), spec("SlidingWindowSpec", 32, sliding_window=64)
    s = {"groups": lambda: steps(full, full), "window": lambda: steps(window),
         "layerwise": lambda: steps(layerwise=True)}[unfit]()
    if unfit == "layerwise":
        assert s.make(computes=True).loads
        s.node.end(1, 0)
    s.step(computes=True, fenced=True)
    s.step(computes=True, fenced=True)
    assert s.load_one() == ({"layerwise": True} if unfit == "layerwise" else {})


class WaitingAgent:
    def __init__(self, waits: list[tuple[list[int], int]]) -> None:
        self.waits = waits

    def wait_loaded(self, ops: list[int], stream: int) -> None:
        self.waits.append((ops, stream))

    def close(self) -> None:
        pass


def test_a_worker_waits_once_and_says_so(engine_config: Any) -> None:  # noqa: F811
    waits: list[tuple[list[int], int]] = []
    side = WorkerSide(engine_config, None, options(""))
    side._agents, side._stream = [WaitingAgent(waits), WaitingAgent(waits)], lambda: 77
    step = StepMetadata(4, arriving=[8, 9])
    side.fence(step)
    assert waits == [([8, 9], 77)] * 2, "each agent, on the stream that computes"
    assert side.finish_step(step) == (set(), set()) and len(waits) == 2
    assert (side.stats(step).step, side.stats(step).fenced) == (4, True)

    step = StepMetadata(5, arriving=[10])       # of an engine that fences some steps only
    side.finish_step(step)
    assert waits[2:] == [([10], 77)] * 2
    assert (side.stats(step).step, side.stats(step).fenced) == (5, False)
    side.fence(None)
    assert len(waits) == 4


def test_the_connector_that_comes_with_vllm_fences_nothing(
        engine_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It is not called before steps: its workers must not say that they were."""
    from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
    config = copy.copy(engine_config)
    config.kv_transfer_config = KVTransferConfig(kv_connector="FlexKVConnectorV1", kv_role="kv_both",
                                                 engine_id="e")
    impl = FlexKVConnectorV1Impl(config, SimpleNamespace(name="WORKER"))
    for number in range(1, 4):
        wrapper = SimpleNamespace(has_connector_metadata=lambda: True,
                                  _get_connector_metadata=lambda n=number: StepMetadata(n))
        monkeypatch.setattr(impl, "_wrapper", wrapper)
        if hasattr(impl, "handle_preemptions"):
            impl.handle_preemptions(StepMetadata(number))
        impl.start_load_kv(None)
        impl.get_finished(set())
        stats = impl.get_kv_connector_stats()
        assert (stats.step, stats.fenced) == (number, False)
