"""Our connectors under vLLM's own scheduler, the real node and real agents, with a pretended model
that checks every byte of KV it is given: see vllm_sim.py."""
import importlib.util
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

import tiny_model
from vllm_sim import BLOCK, POISON, VOCAB, Engine, Setup, check_outputs, scenario

from flexkv.integration.vllm.versions import transfer_results
from flexkv.program import find_program

STEPS = int(os.environ.get("FK_SIM_STEPS", "500"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write("gqa", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "4M")
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def all_blocks_back(engine: Engine) -> bool:
    """All but the null block."""
    return engine.free_blocks() == engine.setup.blocks - 1


def live_through(setup: Setup, model: Path, seed: int, disturb=lambda step: None,
                 made: list[Engine] | None = None) -> Engine:
    """made: to be given the engine, for disturb."""
    if any(setup.windows) and transfer_results() is None:
        pytest.skip("with several KV groups or windows caching is off in this vLLM")
    engine = Engine(setup, model)
    if made is not None:
        made.append(engine)
    try:
        prompts = scenario(engine, seed, STEPS, disturb)
        check_outputs(engine, prompts)
        assert all_blocks_back(engine), f"{engine.free_blocks()} blocks are free"
        assert engine.checked > 1000
    finally:
        engine.close()
    return engine


SETUPS = {
    "ours": Setup(),
    "upstream": Setup(kind="upstream"),
    "ours-overlap": Setup(overlap=True),
    "upstream-overlap": Setup(kind="upstream", overlap=True),
    "ours-sync": Setup(sync=True),
    "upstream-sync": Setup(kind="upstream", sync=True),
    "sync-overlap": Setup(sync=True, overlap=True),
    "layerwise": Setup(layerwise=True),
    "layerwise-overlap": Setup(layerwise=True, overlap=True),
    "drafts": Setup(drafts=3),
    "upstream-drafts": Setup(kind="upstream", drafts=3),
    "window": Setup(windows=(64,)),
    "window-drafts": Setup(windows=(0, 64), blocks=200, drafts=3),
    "groups": Setup(windows=(0, 64), blocks=200),
    "groups-overlap": Setup(windows=(0, 64, 100), blocks=260, overlap=True),
    # Loads reported before their bytes are there.
    "early": Setup(early_ms=10),
    "early-overlap": Setup(early_ms=5, overlap=True, told_with_steps=True),
    "early-sync": Setup(early_ms=3, sync=True),
    "early-drafts": Setup(early_ms=3, drafts=3, idle_fences=False),
    "early-ranks": Setup(early_ms=10, ranks=2, overlap=True, told_with_steps=True),
}
NEVER_EARLY = {
    "upstream": Setup(kind="upstream", early_ms=3),
    "layerwise": Setup(layerwise=True, early_ms=3),
    "window": Setup(windows=(64,), early_ms=3),
    "groups": Setup(windows=(0, 64), blocks=200, early_ms=3),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("seed", [1, 2])
def test_cpu_tier(name: str, seed: int, model: Path) -> None:
    engine = live_through(SETUPS[name], model, seed)
    if SETUPS[name].kind == "ours":
        assert engine.counts["loaded_blocks"] > 10, "next to nothing was loaded"
    assert bool(engine.layer_loads) == (name == "layerwise")
    assert (engine.arriving > 5) == (engine.setup.early_ms > 0)


@pytest.mark.parametrize("name", NEVER_EARLY)
def test_early_where_it_does_not_fit(name: str, model: Path) -> None:
    """Workers whose copies would be: nobody asks for it."""
    engine: list[Engine] = []
    loaded = [0]

    def disturb(step: int) -> None:
        loaded[0] = engine[0].node.stats()["get_blocks"]
    live_through(NEVER_EARLY[name], model, 1, disturb, engine)
    assert loaded[0] > 10, "next to nothing was loaded"
    assert not engine[0].arriving


@pytest.mark.parametrize("name", ["ours", "upstream", "ours-overlap", "upstream-sync", "layerwise",
                                  "early", "early-overlap", "early-ranks"])
def test_few_blocks(name: str, model: Path) -> None:
    """Requests are preempted all the time."""
    few = Setup(**{**vars(SETUPS[name]), "blocks": 44})
    engine = live_through(few, model, 3)
    assert engine.preemptions > (0 if few.early_ms else 3)      # early ones are aborted more often
    assert bool(engine.arriving) == (few.early_ms > 0)


def on_its_way(model: Path, prompt: list[int], **more: Any) -> tuple[Engine, str]:
    """An engine in which a load of the prompt's blocks, but for the last, has just been reported, and
    the request that it is for. Nothing of it is in the pages: the bytes take long."""
    engine = Engine(Setup(early_ms=200, told_with_steps=True, **more), model)
    engine.add(prompt, 2)
    engine.drain()
    engine.forget()
    for pages in engine.pages:
        for layer in pages:
            layer.fill_(POISON)
    name = engine.add(prompt, 2)
    end = time.monotonic() + 30
    while not engine.just_loaded():
        engine.step()
        assert time.monotonic() < end, "no load ends"
    return engine, name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_waits_for_what_is_on_its_way(ranks: int, overlap: bool, model: Path) -> None:
    prompt = [i * 7 % VOCAB for i in range(10 * BLOCK)]
    engine, name = on_its_way(model, prompt, ranks=ranks, overlap=overlap)
    try:
        engine.drain()
        assert engine.cached[name] == len(prompt) - 1 and engine.arriving == 1
        check_outputs(engine, {"r1": prompt, name: prompt})
        assert all_blocks_back(engine)
    finally:
        engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("defers", [False, True])
def test_blocks_given_back_with_bytes_on_their_way(ranks: int, defers: bool, model: Path) -> None:
    """The request is aborted, and the next one gets its blocks at once: late bytes would fall on what
    it has computed."""
    prompt = [i * 7 % VOCAB for i in range(10 * BLOCK)]
    engine, name = on_its_way(model, prompt, ranks=ranks, overlap=True, defers=defers, blocks=24)
    try:
        engine.abort(name)
        assert all_blocks_back(engine), "they were given back at once"
        other = [7] * (20 * BLOCK)
        engine.add(other, 30)
        engine.drain()
        assert engine.arriving == 1
        check_outputs(engine, {"r1": prompt, "r3": other})
        assert all_blocks_back(engine)
    finally:
        engine.close()


@pytest.mark.parametrize("running", [False, True])
def test_reset_with_bytes_on_their_way(running: bool, model: Path) -> None:
    prompt = [i * 7 % VOCAB for i in range(10 * BLOCK)]
    engine, name = on_its_way(model, prompt, overlap=True)
    try:
        engine.reset(running)
        engine.drain()
        assert engine.arriving == 1
        check_outputs(engine, {"r1": prompt, name: prompt})
        assert all_blocks_back(engine)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["ours", "upstream"])
def test_block_that_a_step_still_writes(kind: str, model: Path) -> None:
    """An engine that gives out an aborted request's blocks at once: a load into them must not begin
    before the step that writes the last one is back."""
    engine = Engine(Setup(kind=kind, overlap=True, defers=False, blocks=24), model)
    try:
        prompt = [i % VOCAB for i in range(10 * BLOCK)]
        prompts = {engine.add(prompt, 1): prompt}
        engine.drain()
        engine.forget()
        other = engine.add([7] * (20 * BLOCK - 8), 30)
        while len(engine.live[other].tokens) < 20 * BLOCK - 4:
            engine.step()
        assert engine.flights, "a step is under way"
        engine.abort(other)
        prompts[engine.add(prompt, 3)] = prompt

        execute = engine._execute
        engine._execute = lambda flight: [time.sleep(0.05), execute(flight)][1]  # the load is faster
        engine.drain()
        check_outputs(engine, prompts)
        assert engine.cached["r3"] == len(prompt) - 1, "it was loaded"
        assert all_blocks_back(engine)
    finally:
        engine.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_that_steps_still_write(seed: int, model: Path) -> None:
    setup = Setup(overlap=True, defers=False, blocks=44)
    rng = random.Random(seed)
    engine: list[Engine] = []

    def disturb(step: int) -> None:
        if engine[0].flights and engine[0].live and rng.random() < 0.05:
            engine[0].abort(rng.choice(list(engine[0].live)))
    live_through(setup, model, seed, disturb, engine)
    assert engine[0].counts["loaded_blocks"] > 10, "next to nothing was loaded"


def test_nobody_says_which_step_is_back(model: Path) -> None:
    """With the engine of the test before: no load can begin any more, and none may hang."""
    engine: list[Engine] = []

    def disturb(step: int) -> None:
        if step == STEPS // 2:
            engine[0].says_steps = False
    live_through(Setup(overlap=True, defers=False, blocks=44), model, 4, disturb, engine)
    assert engine[0].counts["loaded_blocks"] > 10, "next to nothing was loaded before"


@pytest.mark.parametrize("name", ["ours", "upstream", "ours-overlap", "ours-sync", "layerwise",
                                  "upstream-sync", "window", "groups", "groups-overlap", "early",
                                  "early-overlap", "early-sync", "early-ranks"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_failing_ssd(name: str, policy: str, model: Path, tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "192K" if name.startswith("groups") or "ranks" in name
                       else "96K")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "16M")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(tmp_path / "ssd"))
    monkeypatch.setenv("FK_TEST_FAULT", "read_error=0.3,read_flip=0.3,delay=0.3")
    setup = Setup(**{**vars(SETUPS[name]), "policy": policy})
    failed = 0.0
    for seed in range(5, 11):           # how many loads there are, and of what, is a matter of time
        engine = live_through(setup, model, seed)
        if policy == "recompute":
            assert set(engine.reasons.values()) == {"length"}
        failed += engine.counts.get("failed_loads", 0)
        if failed or setup.kind != "ours":
            return
    raise AssertionError("no load failed: nothing was tested")


def asked_again(model: Path, prompts: int, times: int) -> tuple[Engine, list[bool]]:
    """Prompts that only the SSD has, one after the other: was each loaded?"""
    engine = Engine(Setup(blocks=100, max_tokens_per_step=512), model)
    try:
        texts = [[(i * 31 + k) % VOCAB for k in range(30 * BLOCK)] for i in range(prompts)]
        asked = {}
        for text in texts:
            asked[engine.add(text, 1)] = text
            engine.drain()
            end = time.monotonic() + 30
            while engine.node.stats()["write_backlog_blocks"]:
                assert time.monotonic() < end, "blocks wait for the SSD for ever"
                time.sleep(0.02)
        loaded = []
        for text in texts[:times]:
            engine.forget()
            name = engine.add(text, 1)
            asked[name] = text
            engine.drain()
            loaded.append(engine.cached[name] > 0)
        check_outputs(engine, asked)
        return engine, loaded
    finally:
        engine.close()


@pytest.mark.parametrize("slow", [False, True])
def test_slow_disk_is_not_waited_for(slow: bool, model: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read takes half a second, what it brings is computed in much less: that is known before
    the first prompt is asked for again, so not even that one is loaded."""
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "1M")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "16M")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", str(tmp_path / "ssd"))
    if slow:
        monkeypatch.setenv("FK_TEST_FAULT", "delay=1,delay_us=500000")
    engine, loaded = asked_again(model, 16, 7)
    if slow:
        assert not any(loaded), f"loaded: {loaded}"
    else:
        assert sum(loaded) > 4, f"loaded: {loaded}"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen]]:
    """A daemon, and the way to start another: the list's last one runs."""
    address = f"ipc://{tmp_path}/node"
    monkeypatch.setenv("FLEXKV_SERVER_CLIENT_MODE", "1")
    monkeypatch.setenv("FLEXKV_SERVER_LAUNCH_MODE", "external")
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", address)
    monkeypatch.setenv("FLEXKV_SERVER_TIMEOUT_MS", "300")
    monkeypatch.setenv("FLEXKV_MAX_SPACES", "3")
    running: list[subprocess.Popen] = []
    start_daemon(running)
    yield running
    for process in running:
        process.kill()
        process.wait()


def start_daemon(running: list[subprocess.Popen]) -> None:
    running.append(subprocess.Popen([find_program(), "serve"]))
    end = time.monotonic() + 30
    while subprocess.run([find_program(), "status"], capture_output=True).returncode:
        assert running[-1].poll() is None and time.monotonic() < end, "the daemon does not serve"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["ours", "upstream", "ours-overlap", "ours-sync", "groups", "early",
                                  "early-ranks"])
def test_daemon_killed(name: str, model: Path, daemon: list[subprocess.Popen]) -> None:
    """kill -9 in the middle, and a new one some steps later, again and again."""
    def disturb(step: int) -> None:
        if step % 120 == 60:
            daemon[-1].kill()
            daemon[-1].wait()
        elif step % 120 == 90:
            start_daemon(daemon)
    engine = live_through(SETUPS[name], model, 7, disturb)
    assert len(daemon) > 3
    assert set(engine.reasons.values()) == {"length"}


@pytest.mark.parametrize("name", ["ours", "upstream-sync", "early-overlap"])
def test_daemon_stopped(name: str, model: Path, daemon: list[subprocess.Popen]) -> None:
    """SIGSTOP, and SIGCONT after a while."""
    def disturb(step: int) -> None:
        if step % 200 == 100:
            daemon[-1].send_signal(signal.SIGSTOP)
        elif step % 200 == 130:
            daemon[-1].send_signal(signal.SIGCONT)
    engine = live_through(SETUPS[name], model, 8, disturb)
    assert set(engine.reasons.values()) == {"length"}
