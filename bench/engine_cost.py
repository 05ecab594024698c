"""What a request costs the scheduler's thread, in microseconds: the part of engine.py that needs no engine.

A prompt of TOKENS tokens is new (looked up in vain, computed, stored) or known (looked up, loaded), through each layer:

  module      the extension's objects: keys from the engine's block hashes, match, get; put
  upstream    vLLM's FlexKVConnectorV1 over our scheduler's side: the calls that vLLM's scheduler makes for it
  ours        FlexKV's connector class, likewise
  KVManager   the reference's API: keys from tokens, masks, slot mappings
  vLLM        CPUOffloadingManager, what vLLM's own offloading asks for the same blocks

All are called in a loop, without a pause. What an engine does between two steps takes 20 ms or so, in which the
processor's caches forget and the thread sleeps: the rows "after a pause" have such a sleep before each call (plain
Python takes 1.8 times as long then). The node is in this process, or a daemon's. Blocks are small: copies run in
another thread and take no part, but they share the machine. The put of a full tier evicts as many blocks as it stores.
"""
import contextlib
import ctypes
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_table as table

TOKENS = 8192
BLOCKS = (16, 32)               # tokens in one; 32 is the least that vLLM takes on a CPU
PAGE_BYTES = 256
WAIT_SECONDS = 20
BARS = {"embedded": (40, 60), "daemon": (80, 100)}
Samples = dict[str, list[float]]


def timed(samples: Samples, name: str, *calls: Callable[[], Any]) -> Any:
    """One sample: what the calls take together. The last one's result."""
    start = time.perf_counter_ns()
    for call in calls:
        result = call()
    samples.setdefault(name, []).append((time.perf_counter_ns() - start) / 1000)
    return result


@contextlib.contextmanager
def settings(**env: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({"FLEXKV_LOG_LEVEL": "WARNING", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}, **env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def daemon(mode: str, blocks: int) -> Iterator[str | None]:
    """The address of a daemon with so many blocks, None where the node is to be here."""
    if mode == "embedded":
        yield None
        return
    from flexkv.integration.vllm.node import find_program
    with tempfile.TemporaryDirectory(prefix="fk-bench-") as folder:
        address = f"ipc://{folder}/daemon"
        process = subprocess.Popen([find_program(), "serve", "--address", address, "--set", f"cpu_cache_blocks={blocks}",
                                    "--set", "log_level=WARNING"])
        try:
            _wait(lambda: os.path.exists(f"{folder}/daemon"), "the daemon does not start")
            yield address
        finally:
            process.terminate()
            process.wait(WAIT_SECONDS)


def _wait(what: Callable[[], bool], message: str, pause: float = 0.001) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not what():
        if time.monotonic() > end:
            raise SystemExit(message)
        if pause:
            time.sleep(pause)


# ---- the extension module ------------------------------------------------------------------------

def module(address: str | None, block: int, rounds: int, blocks: int) -> Samples:
    import python_api
    n = TOKENS // block
    rig = python_api.Rig(address, block, n, blocks // n - 2, events=False)
    rng = random.Random(block)
    try:
        python_api.measure(rig, WARM_UP, rng)
        found = python_api.measure(rig, rounds, rng)
    finally:
        rig.node.close()
    return {"match": [sum(parts) for parts in zip(found["keys"], found["match"], found["get"])], "put": found["put"]}


# ---- the connectors' scheduler side --------------------------------------------------------------

class Steps:
    """Plays vLLM's scheduler for one connector object. Stand-ins have what a scheduler's side looks at.
    pause: seconds that a step takes, in which this thread sleeps."""

    def __init__(self, connector: Any, pages: list[int], pause: float) -> None:
        self.connector = connector
        self.pause = pause
        self.blocks = SimpleNamespace(get_block_ids=lambda: (pages,))
        self.state = SimpleNamespace(get_block_ids=lambda _: (pages,))
        self.pages = pages

    def request(self, name: str, hashes: list[bytes], tokens: int) -> Any:
        return SimpleNamespace(request_id=name, block_hashes=hashes, num_tokens=tokens, num_computed_tokens=0,
                               num_prompt_tokens=tokens, lora_request=None, cache_salt=None, namespace_info=None,
                               skip_reading_prefix_cache=False, num_preemptions=0, resumable=False)

    def schedule(self, tokens: dict[str, int]) -> Any:
        return SimpleNamespace(num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values()),
                               preempted_req_ids=None, finished_req_ids=set(), kv_connector_block_state=self.state,
                               new_block_ids_to_zero=None)

    def output(self, meta: Any) -> Any:
        from vllm.v1.outputs import KVConnectorOutput

        from flexkv.integration.vllm.protocol import StepStats
        return KVConnectorOutput(kv_connector_stats=StepStats(step=meta.step))

    def finish(self, request: Any) -> bool:
        all_groups = getattr(self.connector, "request_finished_all_groups", None)
        return all_groups(request, (self.pages,))[0] if all_groups else self.connector.request_finished(
            request, self.pages)[0]

    def empty_step(self, field: str, name: str) -> bool:
        """As vLLM steps on while something is under way: has it ended?"""
        output = self.output(self.connector.build_connector_meta(self.schedule({})))
        self.connector.update_connector_output(output)
        return name in (getattr(output, field) or ())

    def new(self, samples: Samples, name: str, hashes: list[bytes], tokens: int) -> None:
        connector, request = self.connector, self.request(name, hashes, tokens)
        timed(samples, "miss", lambda: connector.get_num_new_matched_tokens(request, 0),
              lambda: connector.update_state_after_alloc(request, self.blocks, 0))
        step = self.schedule({name: tokens})
        meta = timed(samples, "build", lambda: connector.build_connector_meta(step))
        request.num_computed_tokens = tokens
        output = self.output(meta)
        if self.pause:
            time.sleep(self.pause)
        delayed = timed(samples, "finish", lambda: self.finish(request))
        timed(samples, "update", lambda: connector.update_connector_output(output))
        if not delayed:
            raise SystemExit("the prompt was not stored")
        if name not in (output.finished_sending or ()):
            _wait(lambda: self.empty_step("finished_sending", name), "a store does not end", self.pause / 20)

    def known(self, samples: Samples, name: str, hashes: list[bytes], tokens: int) -> None:
        connector, request = self.connector, self.request(name, hashes, tokens)
        found = []

        def match() -> None:
            found.append(connector.get_num_new_matched_tokens(request, 0)[0])
        timed(samples, "match", match, lambda: connector.update_state_after_alloc(request, self.blocks, found[0]))
        if found[0] != tokens:
            raise SystemExit(f"{found[0]} of {tokens} tokens are known")
        _wait(lambda: self.empty_step("finished_recving", name), "a load does not end", self.pause / 20)
        request.num_computed_tokens = tokens
        connector.update_state_after_alloc(request, self.blocks, 0)
        self.finish(request)

    def decode(self, samples: Samples, count: int) -> None:
        """Steps of a batch in which no block is filled: what every step costs that FlexKV has nothing to do in."""
        names = [f"decode-{i}" for i in range(DECODING)]
        requests = {name: self.request(name, [], 5) for name in names}
        for request in requests.values():
            self.connector.get_num_new_matched_tokens(request, 0)
        step = self.schedule(dict.fromkeys(names, 1))
        for _ in range(count):
            meta = timed(samples, "step: build", lambda: self.connector.build_connector_meta(step))
            output = self.output(meta)
            timed(samples, "step: update", lambda: self.connector.update_connector_output(output))
        for request in requests.values():
            self.finish(request)


DECODING = 8            # requests in a decode step
STEP_SECONDS = 0.02     # of an engine, where there is to be a pause
WARM_UP = 20            # rounds


def vllm_config(kind: str, folder: Path, block: int) -> tuple[Any, Any]:
    """Of an engine with one full-attention group of blocks of so many tokens, and its KV cache."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    import vllm_plans
    config = EngineArgs(skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
                        **vllm_plans.model(folder, "gqa"),
                        **vllm_plans.connector(kind)).create_engine_config()
    config.cache_config.block_size = block
    spec = FullAttentionSpec(block_size=block, num_kv_heads=4, head_size=64, dtype=torch.float32)
    return config, KVCacheConfig(num_blocks=TOKENS // block + 1, kv_cache_tensors=[],
                                 kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])


def agent(config: Any, pages: int, cache: Any) -> tuple[Any, Any]:
    """What the engine's worker would have registered, and its memory. cache: None where the connector
    is not told of it."""
    import flexkv
    from flexkv.integration.vllm import identity
    from flexkv.integration.vllm import settings as options
    from flexkv.integration.vllm.groups import groups_of
    group = groups_of(config, cache)[0]
    memory = ctypes.create_string_buffer(pages * PAGE_BYTES)
    name = identity.space_name(config, group, 1, identity.group_identity(identity.engine_identity(config), group, 1))
    return flexkv.Agent(options.read(config).address, [(ctypes.addressof(memory), PAGE_BYTES, PAGE_BYTES, pages)],
                        space=name, instance=str(config.kv_transfer_config.engine_id)), memory


@contextlib.contextmanager
def no_rate() -> Iterator[None]:
    """Nothing is computed here, so its speed is not measured: a node declines hits of an engine that computes
    faster than it can load."""
    from flexkv.integration.vllm.rate import PrefillRate
    step, PrefillRate.step = PrefillRate.step, lambda *_: None
    try:
        yield
    finally:
        PrefillRate.step = step


def connector(kind: str, address: str | None, block: int, rounds: int, blocks: int, models: Path,
              pause: float = 0) -> Samples:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    if kind == "ours":
        from flexkv.integration.vllm.connector import FlexKVConnectorV1
    else:
        from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1
    env = {"FLEXKV_CPU_CACHE_BLOCKS": str(blocks)}
    if address:
        env |= {"FLEXKV_SERVER_CLIENT_MODE": "1", "FLEXKV_SERVER_RECV_PORT": address,
                "FLEXKV_SERVER_LAUNCH_MODE": "external"}
    with settings(**env):
        config, cache = vllm_config(kind, models, block)
        worker, _memory = agent(config, cache.num_blocks, None if kind == "upstream" else cache)
        steps = Steps(FlexKVConnectorV1(config, KVConnectorRole.SCHEDULER, cache), list(range(1, TOKENS // block + 1)),
                      pause)
    rng, samples = random.Random(block), {}
    try:
        with no_rate():
            for i in range(-WARM_UP, rounds):
                hashes = [rng.randbytes(32) for _ in range(TOKENS // block)]
                kept: Samples = samples if i >= 0 else {}
                steps.new(kept, f"new-{i}", hashes, TOKENS)
                steps.known(kept, f"known-{i}", hashes, TOKENS)
        steps.decode(samples, rounds)
    finally:
        steps.connector.shutdown()
        worker.close()
    return {"match": samples["match"], "miss": samples["miss"],
            "put": [sum(parts) for parts in zip(samples["build"], samples["finish"], samples["update"])],
            "step": [sum(parts) for parts in zip(samples["step: build"], samples["step: update"])]}


# ---- the reference's API -------------------------------------------------------------------------

def kv_manager(address: str | None, block: int, rounds: int, blocks: int) -> Samples:
    import numpy as np
    import torch

    from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig
    from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
    from flexkv.kvmanager import KVManager
    from flexkv.server.client import KVTPClient
    n = TOKENS // block
    GLOBAL_CONFIG_FROM_ENV.server_client_mode = address is not None
    GLOBAL_CONFIG_FROM_ENV.server_launch_mode = "external" if address else "embedded"
    with settings():
        manager = KVManager(ModelConfig(num_layers=1, num_kv_heads=1, head_size=2, kv_dim=1, dtype=torch.float32),
                            CacheConfig(tokens_per_block=block, num_cpu_blocks=blocks, enable_ssd=False),
                            server_recv_port=address or f"ipc://@fk-bench-{os.getpid()}")
        manager.start()
        worker = KVTPClient(manager.gpu_register_port, 0, 0, intra_client_id=0)
        worker.register_to_server([torch.zeros(1, n, block, 1, 2)], KVCacheLayout(
            KVCacheLayoutType.LAYERFIRST, 1, n, block, num_head=1, head_size=2, kv_dim=1))
        _wait(manager.is_ready, "KVManager does not become ready")
    rng, samples = np.random.default_rng(block), {}
    slots = np.arange(TOKENS, dtype=np.int64)
    try:
        for i in range(-WARM_UP, rounds):
            kept: Samples = samples if i >= 0 else {}
            tokens = rng.integers(0, 1 << 17, TOKENS)
            task = timed(kept, "put", lambda: manager.put_async(tokens, slots))
            _succeeded(manager, task)
            found = []

            def match() -> None:
                found.extend(manager.get_match(tokens))
            timed(kept, "match", match, lambda: manager.launch(found[0], slots))
            if not found[1].all():
                raise SystemExit("KVManager does not know all tokens")
            _succeeded(manager, found[0])
    finally:
        manager.shutdown()
        worker.close()
    return samples


def _succeeded(manager: Any, task: int) -> None:
    response = manager.wait(task, timeout=WAIT_SECONDS)[task]
    if response.status.value != "success":
        raise SystemExit(f"KVManager's task ended as {response.status}")


# ---- the peer ------------------------------------------------------------------------------------

def vllm_manager(block: int, rounds: int, blocks: int) -> Samples:
    """What vLLM's own offloading asks its manager for the same blocks. Its connector's share is not in it."""
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
    manager = CPUOffloadingManager(num_chunks=blocks)
    rng, samples = random.Random(block), {}
    for i in range(-WARM_UP, rounds):
        kept: Samples = samples if i >= 0 else {}
        hashes = [rng.randbytes(32) for _ in range(TOKENS // block)]

        def put() -> None:
            context = ReqContext(req_id=f"new-{i}")
            manager.on_new_request(context)
            keys = [make_offload_key(h, 0) for h in hashes]
            if manager.prepare_store(keys, context) is None:
                raise SystemExit("vLLM's manager has no room")
            manager.complete_store(keys, context)
            manager.on_request_finished(context)
        timed(kept, "put", put)
        context = ReqContext(req_id=f"known-{i}")
        keys: list[Any] = []

        def match() -> None:
            manager.on_new_request(context)
            keys.extend(make_offload_key(h, 0) for h in hashes)
            if any(manager.lookup(key, context) is not LookupResult.HIT for key in keys):
                raise SystemExit("vLLM's manager does not know its blocks")
            manager.prepare_load(keys, context)
        timed(kept, "match", match)
        manager.complete_load(keys, context)
        manager.on_request_finished(context)
    return samples


# ---- the table -----------------------------------------------------------------------------------

def run(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fk-bench-") as folder:
        for block in BLOCKS:
            _run_block(block, rounds, Path(folder))


def _run_block(block: int, rounds: int, models: Path) -> None:
    n = TOKENS // block
    roomy, full = (rounds + WARM_UP + 6) * n, 6 * n
    rows = []
    for mode in ("embedded", "daemon"):
        for title, measure in (
                ("module", lambda a, b: module(a, block, rounds, b)),
                ("upstream connector", lambda a, b: connector("upstream", a, block, rounds, b, models)),
                ("FlexKV's connector", lambda a, b: connector("ours", a, block, rounds, b, models)),
                ("KVManager", lambda a, b: kv_manager(a, block, rounds, b))):
            with daemon(mode, roomy) as address:
                rows.append(_row(f"{title}, {mode}", measure(address, roomy), BARS[mode]))
        with daemon(mode, roomy) as address:
            rows.append(_row(f"FlexKV's connector, {mode}, after a pause",
                             connector("ours", address, block, rounds // 3, roomy, models, STEP_SECONDS), None))
    with daemon("embedded", full):
        rows.append(_row("FlexKV's connector, embedded, full tier",
                         connector("ours", None, block, rounds, full, models), BARS["embedded"]))
    rows.append(_row("vLLM's CPU offloading manager", vllm_manager(block, rounds, roomy), None))
    rows.append(_row("vLLM's CPU offloading manager, full", vllm_manager(block, rounds, full), None))
    table.show(f"Scheduler's thread, a prompt of {TOKENS} tokens in {n} blocks of {block}: microseconds, median (p99)",
               ("", "match + launch", "bar", "put", "bar", "miss", "idle step"), rows)


def _row(name: str, samples: Samples, bars: tuple[float, float] | None) -> tuple[str, ...]:
    def cell(key: str) -> str:
        values = sorted(samples.get(key, ()))
        return f"{table.median(values):.1f} ({values[int(len(values) * 0.99)]:.0f})" if values else ""
    match, put = (table.verdict(table.median(samples[key]), bar) if bars else "" for key, bar in
                  zip(("match", "put"), bars or (0, 0)))
    return (name, cell("match"), match, cell("put"), put, cell("miss"), cell("step"))
