"""vLLM's own scheduler and our connectors around a pretended model: no engine process, no weights,
thousands of steps a second.

The model's KV is an 8-byte digest of all tokens up to a position, per layer, written into real
pages; whenever a position is computed, the pages of all earlier ones that attention reaches are
checked, byte for byte. The next token is a digest too, so what a request says does not
depend on what was cached. The node, its agents and the copying are the real ones. Requests
come, are aborted, run out of blocks, and loads fail, as a seed says.
"""
import hashlib
import itertools
import os
import pickle
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from vllm.config import KVEventsConfig, KVTransferConfig, set_current_vllm_config
from vllm.distributed import kv_transfer
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec,
                                        SlidingWindowSpec)
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from flexkv.integration.vllm.node import open_node
from flexkv.integration.vllm.versions import transfer_results

BLOCK = 16
CELL = 8                # bytes of KV per token and layer
VOCAB = 2000
NO_TOKEN = VOCAB + 1    # never said
POISON = 0xA5           # in pages that nobody has computed
OURS = "flexkv.integration.vllm"


@dataclass
class Setup:
    kind: str = "ours"
    windows: tuple[int, ...] = (0,)     # of each group; 0: full attention
    blocks: int = 120
    overlap: bool = False               # a step is scheduled before the last one's output is there
    sync: bool = False
    layerwise: bool = False
    defers: bool = True                 # the engine keeps blocks that a step under way may write
    policy: str = "recompute"
    max_tokens_per_step: int = 256
    max_model_len: int = 512
    layers: int = 2                     # of each group
    drafts: int = 0                     # tokens guessed ahead of each step, some of them rightly
    events: bool = False                # the engine publishes KV events: see Engine.published
    early_ms: int = 0                   # loads may be reported so long before their bytes are there
    told_with_steps: bool = False       # see StepNode
    ranks: int = 1                      # workers, each with its part of the KV
    idle_fences: bool = True            # connectors are called before steps that compute nothing, too


@dataclass
class Live:
    """A request as the model sees it."""
    request: Request
    tokens: list[int]


@dataclass
class Flight:
    output: Any                         # the scheduler's
    tables: dict[str, tuple[list[int], ...]]
    starts: dict[str, int]
    known: dict[str, int]               # tokens of each request then
    live: dict[str, Live]               # also those that end before the step is executed


class LateNode:
    """Completions are seen a little later, so that a step finds its loads under way."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._kept: list[Any] = []          # completions that the connector has yet to get

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def poll(self, most: int, timeout_ms: int) -> list[Any]:
        late, self._kept = self._kept, []
        self._kept += self._node.poll(256, 0 if late else timeout_ms)
        return late


class StepNode:
    """Completions are seen when a step's output comes back, not when the next step is made: that one is
    the first that can be told of loads on their way, and the first that may use them."""

    def __init__(self, node: Any, engine: "Engine") -> None:
        self._node, self._engine = node, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def poll(self, most: int, timeout_ms: int) -> list[Any]:
        return [] if self._engine.scheduling else self._node.poll(most, timeout_ms)


class Engine:
    def __init__(self, setup: Setup, model: Path) -> None:
        self.setup = setup
        self.live: dict[str, Live] = {}
        self.finished: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.flights: deque[Flight] = deque()
        self.checked = 0                # cells
        self.cached: dict[str, int] = {}
        self.preemptions = 0
        self.layer_loads = 0
        self.arriving = 0                   # operations that were reported while they were on their way
        self.scheduling = False
        self.says_steps = True              # the workers' statistics come through
        self.random = random.Random(1)
        self.counts: dict[str, float] = {}
        self._count = 0
        os.environ["FLEXKV_SYNC_GET"] = str(int(setup.sync))
        os.environ["FLEXKV_ENABLE_LAYERWISE_TRANSFER"] = str(int(setup.layerwise))
        self.config = self._config(model)
        with set_current_vllm_config(self.config):
            self._make()

    def _config(self, model: Path) -> Any:
        transfer = KVTransferConfig(
            kv_connector="FlexKVConnectorV1", kv_role="kv_both",
            kv_load_failure_policy=self.setup.policy,
            kv_connector_module_path=("flexkv.integration.vllm.connector"
                                      if self.setup.kind == "ours" else None))
        config = EngineArgs(
            model=str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
            block_size=32, max_model_len=self.setup.max_model_len,
            max_num_batched_tokens=self.setup.max_tokens_per_step, max_num_seqs=16,
            enable_prefix_caching=True, kv_transfer_config=transfer,
            disable_hybrid_kv_cache_manager=self.setup.kind != "ours",
            speculative_config={"method": "ngram", "num_speculative_tokens": self.setup.drafts,
                                "prompt_lookup_max": 4} if self.setup.drafts else None,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null")
            if self.setup.events else None,
        ).create_engine_config()
        config.cache_config.block_size = BLOCK
        config.cache_config.num_gpu_blocks = self.setup.blocks
        config.scheduler_config.async_scheduling = self.setup.overlap
        config.scheduler_config.enable_chunked_prefill = True
        config.parallel_config.data_parallel_size = 1
        config.parallel_config.tensor_parallel_size = self.setup.ranks
        return config

    def _make(self) -> None:
        setup = self.setup
        groups: list[KVCacheGroupSpec] = []
        for g, window in enumerate(setup.windows):
            common = dict(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
            spec = (SlidingWindowSpec(sliding_window=window, **common) if window
                    else FullAttentionSpec(**common))
            groups.append(KVCacheGroupSpec([f"model.layers.{g + len(setup.windows) * i}.attn"
                                            for i in range(setup.layers)], spec))
        self.kv_config = KVCacheConfig(num_blocks=setup.blocks, kv_cache_tensors=[],
                                       kv_cache_groups=groups)
        # Of each rank, its layers'. As in the engine groups share memory, a block belongs to one of them
        # at a time.
        self.pages = [[torch.full((setup.blocks, BLOCK, CELL), POISON, dtype=torch.uint8)
                       for _ in range(setup.layers)] for _ in range(setup.ranks)]
        self.workers = [self._worker(rank) for rank in range(setup.ranks)]
        kv_transfer_state._KV_CONNECTOR_AGENT = self.workers[0]
        scheduler = self.config.scheduler_config.get_scheduler_cls()
        with mock.patch(f"{OURS}.versions.defers_frees", lambda: setup.defers), \
                mock.patch(f"{OURS}.scheduler.open_node", self._open_node):
            self.scheduler = scheduler(
                vllm_config=self.config, kv_cache_config=self.kv_config,
                structured_output_manager=StructuredOutputManager(self.config), block_size=BLOCK,
                hash_block_size=BLOCK, log_stats=True)
        self.scheduler.defer_block_free &= setup.defers
        self.scheduler.kv_event_publisher.publish = lambda batch: self.published(batch.events)
        hasher = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        kv_cache_utils.init_none_hash(hasher)
        self.aggregator = KVOutputAggregator(setup.ranks) if setup.ranks > 1 else None
        self.hasher = kv_cache_utils.get_request_block_hasher(BLOCK, hasher)

    def _worker(self, rank: int) -> Any:
        """The ranks' bytes come at different times."""
        tp = SimpleNamespace(rank_in_group=rank, world_size=self.setup.ranks)
        pp = SimpleNamespace(rank_in_group=0, world_size=1)
        early_ms = str(self.setup.early_ms * (rank + 1))
        with mock.patch("vllm.distributed.parallel_state.get_tp_group", lambda: tp), \
                mock.patch("vllm.distributed.parallel_state.get_pp_group", lambda: pp), \
                mock.patch.dict(os.environ, {"FKTEST_EARLY_MS": early_ms}):
            worker = KVConnectorFactory.create_connector(
                self.config, KVConnectorRole.WORKER, self.kv_config)
            kv_transfer_state._KV_CONNECTOR_AGENT = worker
            worker.register_kv_caches({
                name: self.pages[rank][i] for group in self.kv_config.kv_cache_groups
                for i, name in enumerate(group.layer_names)})
        return worker

    def _open_node(self, *arguments: Any) -> Any:
        self.node = open_node(*arguments)
        if self.setup.layerwise:
            self.node = LateNode(self.node)
        elif self.setup.told_with_steps:
            self.node = StepNode(self.node, self)
        return self.node

    def published(self, events: list[Any]) -> None:
        """For tests that look at KV events."""

    # ---- requests ------------------------------------------------------------------------------

    def add(self, tokens: list[int], wanted: int, **more: Any) -> str:
        self._count += 1
        name = f"r{self._count}"
        parameters = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True,
                                    detokenize=False)
        parameters.update_from_generation_config({}, None)
        request = Request(request_id=name, prompt_token_ids=tokens, sampling_params=parameters,
                          pooling_params=None, block_hasher=self.hasher, **more)
        self.live[name] = Live(request, list(tokens))
        self.scheduler.add_request(request)
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.live.pop(name, None)

    # ---- the model -----------------------------------------------------------------------------

    def _cells(self, tokens: list[int], start: int, end: int) -> list[bytes]:
        """KV of the positions [start, end), without the layer."""
        h = hashlib.blake2b(digest_size=CELL)
        cells = []
        for i, token in enumerate(tokens[:end]):
            h.update(token.to_bytes(4, "little"))
            if i >= start:
                cells.append(h.digest())
        return cells

    def next_token(self, tokens: list[int]) -> int:
        h = hashlib.blake2b(b"next", digest_size=4)
        for token in tokens:
            h.update(token.to_bytes(4, "little"))
        return int.from_bytes(h.digest(), "little") % VOCAB

    def _compute(self, live: Live, table: tuple[list[int], ...], start: int, count: int,
                 drafts: list[int]) -> None:
        end = start + count
        tokens = live.tokens[:end - len(drafts)] + drafts
        assert end <= len(tokens), (
            f"{live.request.request_id}: computing [{start}, {end}) of {len(live.tokens)} tokens, the "
            f"engine has {live.request.num_tokens}")
        cells = self._cells(tokens, 0, end)
        for g, window in enumerate(self.setup.windows):
            first = max(0, start - window + 1) if window else 0
            for rank, layer in itertools.product(range(self.setup.ranks), range(self.setup.layers)):
                pages = self.pages[rank][layer]
                for p in range(first, end):
                    page = table[g][p // BLOCK]
                    cell = bytes([c ^ layer ^ (g << 2) ^ (rank << 4) for c in cells[p]])
                    at = pages[page, p % BLOCK]
                    if p < start:
                        self.checked += 1
                        assert page, f"{live.request.request_id}: null block at {p}, group {g}"
                        have = bytes(at.tolist())
                        assert have == cell, (
                            f"{live.request.request_id}: wrong KV at position {p} of group {g} "
                            f"layer {layer} rank {rank} page {page}, computing [{start}, {end})")
                    elif page:
                        at.copy_(torch.frombuffer(bytearray(cell), dtype=torch.uint8))

    def _sample(self, live: Live, end: int, drafts: list[int]) -> list[int]:
        """The token after the computed ones, the same as before if the engine had dropped it; and
        one more for each draft that was right."""
        if end == len(live.tokens):
            live.tokens.append(self.next_token(live.tokens))
        said = [live.tokens[end]]
        for draft in drafts:
            if draft != said[-1]:
                break
            live.tokens.append(self.next_token(live.tokens))
            said.append(live.tokens[-1])
        return said

    def _guess(self) -> None:
        """Drafts for the next step: right ones up to some place, then wrong ones."""
        ids, drafts = [], []
        for name, live in self.live.items():
            if live.request.num_tokens != len(live.tokens):
                continue
            tokens, guessed = list(live.tokens), []
            right = self.random.randrange(self.setup.drafts + 1)
            for i in range(self.setup.drafts):
                tokens.append(self.next_token(tokens))
                guessed.append(tokens[-1] if i < right else NO_TOKEN)
            ids.append(name)
            drafts.append(guessed)
        self.scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))

    # ---- steps ---------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn of the engine's loop; False if there was nothing to do."""
        depth = 2 if self.setup.overlap else 1
        if self.scheduler.has_requests():
            self.scheduling = True
            output = self.scheduler.schedule()
            self.scheduling = False
            tables = {r: self.scheduler.kv_cache_manager.get_block_ids(r)
                      for r in output.num_scheduled_tokens}
            starts = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
            cached = output.scheduled_cached_reqs
            self.preemptions += len(output.preempted_req_ids or ())
            starts.update(zip(cached.req_ids, cached.num_computed_tokens))
            for r in output.scheduled_new_reqs:
                self.cached.setdefault(r.req_id, r.num_computed_tokens)
            known = {r: self.scheduler.requests[r].num_tokens for r in output.num_scheduled_tokens}
            live = {r: self.live[r] for r in output.num_scheduled_tokens}
            self.flights.append(Flight(output, tables, starts, known, live))
            if len(self.flights) < depth and output.total_num_scheduled_tokens:
                return True
        if not self.flights:
            return False
        flight = self.flights.popleft()
        result = self._execute(flight)
        outputs = self.scheduler.update_from_output(flight.output, result)
        self._collect(outputs)
        if self.setup.drafts:
            self._guess()
        if not flight.output.total_num_scheduled_tokens:
            time.sleep(0.0005)          # as the engine does
        return True

    def _execute(self, flight: Flight) -> ModelRunnerOutput:
        """The order of calls is that of the engine's workers: loads that the step does not wait for are
        begun after its forward pass, and only handle_preemptions comes before it."""
        output, computes = flight.output, flight.output.total_num_scheduled_tokens > 0
        metadata = output.kv_connector_metadata
        self.layer_loads += len(metadata.loads)
        self.arriving += len(metadata.arriving)
        lost = {block for load in metadata.failed for block in load.blocks}
        sampled: list[list[int]] = []
        ranks = [(worker, pickle.loads(pickle.dumps(metadata)) if self.setup.ranks > 1 else metadata)
                 for worker in self.workers]
        for worker, its in ranks:
            if computes or self.setup.idle_fences:
                worker.handle_preemptions(its)
            worker.bind_connector_metadata(its)
            if computes and metadata.loads:
                self._begin_loads(worker)
        if not metadata.loads:
            sampled = self._forward(flight, lost)
        for worker, _ in ranks:
            if computes and not metadata.loads:
                self._begin_loads(worker)
        kv = [self._end_loads(worker, output.finished_req_ids) for worker in self.workers]
        if metadata.loads:              # now it is known which of them failed
            sampled = self._forward(flight, set().union(*[k.invalid_block_ids for k in kv]))
        ids = list(output.num_scheduled_tokens)
        results = [ModelRunnerOutput(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)},
                                     sampled_token_ids=sampled,
                                     kv_connector_output=k if self._comes_through(k) else None)
                   for k in kv]
        return results[0] if self.aggregator is None else self.aggregator.aggregate(results)

    def _begin_loads(self, worker: Any) -> None:
        worker.start_load_kv(SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=None))
        for group in self.kv_config.kv_cache_groups:
            for name in group.layer_names:
                worker.wait_for_layer_load(name)

    def _end_loads(self, worker: Any, finished: set[str]) -> KVConnectorOutput:
        kv = self._transfers(worker, finished)
        kv.invalid_block_ids = worker.get_block_ids_with_load_errors()
        kv.kv_connector_stats = worker.get_kv_connector_stats() if self.says_steps else None
        worker.clear_connector_metadata()
        return kv

    def _forward(self, flight: Flight, lost: set[int]) -> list[list[int]]:
        """The tokens that each request says. lost: blocks without their bytes."""
        output = flight.output
        sampled: list[list[int]] = []
        for name, count in output.num_scheduled_tokens.items():
            live = flight.live[name]
            start = flight.starts[name]
            if not lost.isdisjoint(flight.tables[name][0]):
                sampled.append([0])     # computed on what was not loaded; the engine drops it
                continue
            drafts = [d if d >= 0 else NO_TOKEN      # padding
                      for d in output.scheduled_spec_decode_tokens.get(name, ())]
            self._compute(live, flight.tables[name], start, count, drafts)
            end = start + count - len(drafts)
            sampled.append(self._sample(live, end, drafts) if end >= flight.known[name] else [])
        return sampled

    def _comes_through(self, kv: KVConnectorOutput) -> bool:
        """One worker's output is dropped if it is empty; that of several is put together anew."""
        return not self.says_steps or not kv.is_empty()

    def _transfers(self, worker: Any, finished: set[str]) -> KVConnectorOutput:
        """As newer and as older workers ask for it."""
        if transfer_results() is None:
            sending, recving = worker.get_finished(finished)
            return KVConnectorOutput(finished_sending=sending, finished_recving=recving)
        results = worker.get_transfer_results(finished)
        return KVConnectorOutput(
            finished_sending=results.finished_sending, finished_recving=results.finished_recving,
            failed_recving=results.failed_recving)

    def _collect(self, outputs: dict[int, Any]) -> None:
        for out in outputs.values():
            if out.scheduler_stats is not None and out.scheduler_stats.kv_connector_stats:
                for key, value in out.scheduler_stats.kv_connector_stats.items():
                    self.counts[key] = self.counts.get(key, 0) + value
            for o in out.outputs:
                self.finished.setdefault(o.request_id, []).extend(o.new_token_ids)
                if o.finish_reason is not None:
                    self.reasons[o.request_id] = str(o.finish_reason)
                    self.live.pop(o.request_id, None)

    def drain(self, seconds: float = 60.0) -> None:
        """Until nothing is under way, which must not take for ever."""
        end = time.monotonic() + seconds
        while self.scheduler.has_requests() or self.flights:
            self.step()
            assert time.monotonic() < end, (
                f"the engine hangs: {self.scheduler.get_request_counts()} "
                f"{ {n: str(r.status) for n, r in self.scheduler.requests.items()} }")

    def forget(self) -> None:
        """Drops what the engine's own prefix cache has of requests that are gone."""
        pool = self.scheduler.kv_cache_manager.block_pool
        self.scheduler.kv_cache_manager.evict_blocks(
            {b.block_id for b in pool.blocks if not b.ref_cnt and not b.is_null})

    def reset(self, running: bool) -> None:
        """Both caches, with running requests or without; the engine refuses if it must."""
        try:
            self.scheduler.reset_prefix_cache(reset_running_requests=running,
                                              reset_connector=True)
        except RuntimeError as e:
            assert "Failed to reset KV cache" in str(e)

    def just_loaded(self) -> list[str]:
        """Requests whose loads the engine has just been told of, as they are not scheduled yet: their
        blocks are anybody's at once if they are aborted."""
        return sorted(self.scheduler.finished_recving_kv_req_ids & self.live.keys())

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def close(self) -> None:
        kv_transfer.kv_transfer_state._KV_CONNECTOR_AGENT = None
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()
        self.scheduler.shutdown()       # engines in one process do it twice


def scenario(engine: Engine, seed: int, steps: int,
             disturb: Callable[[int], None] = lambda step: None) -> dict[str, list[int]]:
    """Random requests that share prefixes with earlier ones. Returns the prompts. disturb is called
    with the number of each step."""
    rng = random.Random(seed)
    prompts: dict[str, list[int]] = {}
    history: list[list[int]] = []

    def new_prompt() -> list[int]:
        tokens: list[int] = []
        if history and rng.random() < 0.75:
            old = rng.choice(history[-40:])
            tokens = old[:rng.randrange(1, len(old) + 1)]
        tokens = tokens[:320] + [rng.randrange(VOCAB) for _ in range(rng.choice((0, 1, 5, 40, 120)))]
        return tokens or [1]

    for i in range(steps):
        disturb(i)
        if rng.random() < 0.25 and len(engine.live) < 12:
            tokens = new_prompt()
            name = engine.add(tokens, rng.choice((1, 1, 2, 17, 40, 90)))
            prompts[name] = tokens
            history.append(tokens)
        if engine.live and rng.random() < 0.02:
            engine.abort(rng.choice(list(engine.live)))
        if engine.setup.early_ms:
            for name in engine.just_loaded():
                if rng.random() < 0.4:
                    engine.abort(name)
        engine.step()
        for name, said in list(engine.finished.items())[-3:]:
            if name in engine.reasons and name in prompts:
                whole = prompts[name] + said
                if whole not in history[-40:]:
                    history.append(whole)
        if rng.random() < 0.2:
            engine.forget()
        if rng.random() < 0.005:
            engine.reset(rng.random() < 0.5)
    engine.drain()
    return prompts


def check_outputs(engine: Engine, prompts: dict[str, list[int]]) -> None:
    """What was said is what the model says to the prompt, whatever was cached."""
    for name, said in engine.finished.items():
        if engine.reasons.get(name) != "length":
            continue
        tokens = list(prompts[name])
        for token in said:
            assert token == engine.next_token(tokens), f"{name}: wrong token"
            tokens.append(token)
