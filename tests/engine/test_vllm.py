"""The real vLLM with FlexKV, on a CPU with tiny models in float32: what engines with and without it
say must be equal, token for token, and most of it must not be computed twice.

One engine per configuration; each takes half a minute. Needs an environment with vLLM.
"""
import importlib.util
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

from vllm_plans import (BLOCK, Steps, basics, cached, connector, conversations, finish, log, model,
                        run, same_tokens, start)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an engine without FlexKV says to a plan; each plan is run once."""
    folder = tmp_path_factory.mktemp("reference")
    known: dict[str, dict[str, Any]] = {}

    def get(name: str, kind: str, steps: Steps, engine: dict[str, Any] | None = None
            ) -> dict[str, Any]:
        if name not in known:
            known[name] = run(folder, name.replace(" ", "-"),
                              model(models, kind) | (engine or {}), steps)
        return known[name]
    return get


def check_basics(result: dict[str, Any], block: int = BLOCK, spare: int = 0) -> None:
    """What basics() must find. spare: tokens at a prompt's end that are always computed."""
    assert cached(result, "hit") == [33 * block - (block if spare else 0), 15 * block, 30 * block
                                     - (block if spare else 0)]
    assert cached(result, "exact") == [30 * block - (block if spare else 0)]
    # The second one may find all but a block in the engine's own cache: that is not worth a load.
    less = cached(result, "less")
    assert less[0] == 29 * block and less[1] in (29 * block, 30 * block)
    assert cached(result, "more") == [33 * block]
    assert all(n >= 24 * block for n in cached(result, "batch"))
    # The batch's prompts and the tokens generated after them, but for the last token.
    for i, seed in enumerate(range(10, 18)):
        known = 24 * block + 70 + seed + 16 - 1
        assert cached(result, "again")[i] == known // block * block


@pytest.mark.parametrize("kind", ["upstream", "ours"])
@pytest.mark.parametrize("sync", ["0", "1"])
def test_hits(kind: str, sync: str, models: Path, reference: Any, tmp_path: Path) -> None:
    steps = basics() + [["metrics", "metrics"]]
    expected = reference("basics", "gqa", basics())
    result = run(tmp_path, "engine", model(models, "gqa") | connector(kind), steps,
                 FLEXKV_SYNC_GET=sync)
    same_tokens(expected, result)
    check_basics(result, spare=int(sync))
    if kind == "ours":
        metrics = result["metrics"]
        assert metrics["hit_cpu_tokens"] == metrics["loaded_blocks"] * BLOCK > 100 * BLOCK
        assert metrics["source_host"] == metrics["hit_cpu_tokens"]
        assert metrics["failed_loads"] == metrics["errors"] == metrics["dropped_blocks"] == 0


def test_loads_on_their_way(models: Path, reference: Any, tmp_path: Path) -> None:
    """Reported a tenth of a second before their bytes are there: steps wait before they compute."""
    expected = reference("basics", "gqa", basics())
    result = run(tmp_path, "engine", model(models, "gqa") | connector("ours"),
                 basics() + [["metrics", "metrics"]], FKTEST_EARLY_MS="100")
    same_tokens(expected, result)
    check_basics(result)
    assert result["metrics"]["failed_loads"] == result["metrics"]["errors"] == 0
    assert result["metrics"]["early_loads"] > 5, "no load was reported early: nothing was tested"


@pytest.mark.parametrize("kind", ["upstream", "ours"])
def test_conversations(kind: str, models: Path, reference: Any, tmp_path: Path) -> None:
    """200 requests, prompts that grow, the engine's own cache dropped after each turn."""
    steps = conversations(25, 8)
    expected = reference("conversations", "gqa", steps, {"max_num_seqs": 32})
    result = run(tmp_path, "engine", model(models, "gqa") | connector(kind) | {"max_num_seqs": 32},
                 steps)
    same_tokens(expected, result)
    for turn in range(1, 8):
        assert sum(cached(result, f"turn{turn}")) > sum(cached(result, f"turn{turn - 1}"))
        assert min(cached(result, f"turn{turn}")) >= 64 * turn


@pytest.mark.parametrize("kind", ["upstream", "ours"])
def test_ssd_and_restart(kind: str, models: Path, reference: Any, tmp_path: Path) -> None:
    """A cpu tier of 60 blocks in front of an SSD tier; then the same engine again, in a new
    process, with the other connector on the same store."""
    steps = conversations(8, 4)
    env = {"FLEXKV_CPU_CACHE_GB": "15M", "FLEXKV_SSD_CACHE_GB": "0.5",
           "FLEXKV_SSD_CACHE_DIR": str(tmp_path / "ssd1") + ";" + str(tmp_path / "ssd2")}
    metrics = [["metrics", "metrics"]]
    expected = reference("ssd", "gqa", steps)
    first = run(tmp_path, "first", model(models, "gqa") | connector(kind), steps + metrics, **env)
    same_tokens(expected, first)
    assert sum(cached(first, "turn3")) > 8 * 200
    other = "ours" if kind == "upstream" else "upstream"
    second = run(tmp_path, "second", model(models, "gqa") | connector(other), steps + metrics,
                 **env)
    same_tokens(expected, second)
    assert sum(cached(second, "turn0")) > 8 * 128, "nothing was found after the restart"
    metrics = first["metrics"] if kind == "ours" else second["metrics"]
    assert metrics["hit_ssd_tokens"] > 0 and metrics["source_disk"] == metrics["hit_ssd_tokens"]


@pytest.mark.parametrize("kind", ["upstream", "ours"])
@pytest.mark.parametrize("sync", ["0", "1"])
def test_failed_loads_recompute(kind: str, sync: str, models: Path, reference: Any,
                                tmp_path: Path) -> None:
    """One read in twenty of the SSD fails, or brings a wrong bit: no token may differ."""
    steps = conversations(8, 4)
    expected = reference("ssd", "gqa", steps)
    result = run(tmp_path, "engine", model(models, "gqa") | connector(kind),
                 steps + [["metrics", "metrics"]], FLEXKV_SYNC_GET=sync,
                 FLEXKV_CPU_CACHE_GB="15M", FLEXKV_SSD_CACHE_GB="0.5",
                 FLEXKV_SSD_CACHE_DIR=str(tmp_path / "ssd"),
                 FK_TEST_FAULT="read_error=0.05,read_flip=0.05")
    same_tokens(expected, result)
    assert "KV load failure" in log(tmp_path, "engine"), "no load failed: nothing was tested"
    if kind == "ours":
        assert result["metrics"]["failed_loads"] > 0


def test_failed_loads_fail(models: Path, reference: Any, tmp_path: Path) -> None:
    """With the engine's own policy a request whose load fails ends with an error, alone."""
    steps = conversations(8, 4)
    expected = reference("ssd", "gqa", steps)
    result = run(tmp_path, "engine", model(models, "gqa") | connector("ours", policy="fail"),
                 steps, FLEXKV_CPU_CACHE_GB="15M", FLEXKV_SSD_CACHE_GB="0.5",
                 FLEXKV_SSD_CACHE_DIR=str(tmp_path / "ssd"), FK_TEST_FAULT="read_flip=0.1")
    errors = 0
    changed: set[int] = set()       # conversations that go on from an answer that never came
    for turn in range(4):
        for c, (want, have) in enumerate(zip(expected[f"turn{turn}"], result[f"turn{turn}"])):
            if have["reason"] == "error":
                errors += 1
                changed.add(c)
            elif c not in changed:
                assert have["tokens"] == want["tokens"], f"turn{turn}[{c}]"
    assert errors > 0, "no load failed: nothing was tested"


@pytest.mark.parametrize("kind", ["upstream", "ours"])
def test_preemption(kind: str, models: Path, reference: Any, tmp_path: Path) -> None:
    """Too few blocks for all requests at once."""
    small = {"num_gpu_blocks_override": 56, "max_model_len": 1024}
    prompts = [[[seed, 400]] for seed in (21, 22, 23, 24)]
    steps = [["generate", "first", prompts, 150], ["settle", 0.5], ["reset", False],
             ["generate", "second", prompts, 150], ["settle", 0.5], ["reset", False],
             ["abort", "none", prompts, 150, 40], ["reset", False],
             ["generate", "third", prompts, 30]]
    expected = reference("preemption", "gqa", steps, small)
    result = run(tmp_path, "engine", model(models, "gqa") | connector(kind) | small,
                 steps + [["metrics", "metrics"]])
    same_tokens(expected, result)
    assert result["metrics"]["num_preemptions"] > 0, "nothing was preempted"
    assert min(cached(result, "second")) >= 384


@pytest.mark.parametrize("kind", ["upstream", "ours"])
def test_one_process(kind: str, models: Path, reference: Any, tmp_path: Path) -> None:
    """Scheduler and worker in the process of the caller, where steps without output skip the
    scheduler's side unless there is something to say."""
    expected = reference("basics", "gqa", basics())
    result = run(tmp_path, "engine", model(models, "gqa") | connector(kind), basics(),
                 VLLM_ENABLE_V1_MULTIPROCESSING="0")
    same_tokens(expected, result)
    check_basics(result)


@pytest.mark.parametrize("kind", ["upstream", "ours"])
def test_mla(kind: str, models: Path, reference: Any, tmp_path: Path) -> None:
    """One latent vector per token, blocks of 16; the engine has no prefix cache of its own."""
    steps = basics(16)
    expected = reference("mla", "mla", steps)
    result = run(tmp_path, "engine", model(models, "mla") | connector(kind), steps)
    same_tokens(expected, result)
    assert cached(result, "hit") == [33 * 16, 16 * 16, 30 * 16]
    assert cached(result, "exact") == [30 * 16]


def test_sliding_window(models: Path, reference: Any, tmp_path: Path) -> None:
    """Several KV groups: full attention, and a window of 128 tokens."""
    steps = conversations(8, 4)
    expected = reference("window", "swa", steps)
    result = run(tmp_path, "engine", model(models, "swa") | connector("ours"),
                 steps + [["metrics", "metrics"]], FLEXKV_SSD_CACHE_GB="0.5",
                 FLEXKV_SSD_CACHE_DIR=str(tmp_path / "ssd"))
    same_tokens(expected, result)
    assert "-g1" in log(tmp_path, "engine"), "there is only one group: nothing was tested"
    assert min(cached(result, "turn3")) >= 128
    assert result["metrics"]["failed_loads"] == result["metrics"]["errors"] == 0


def test_sliding_window_failures(models: Path, reference: Any, tmp_path: Path) -> None:
    """Failed loads of several groups are reported by request."""
    steps = conversations(8, 4)
    expected = reference("window", "swa", steps)
    result = run(tmp_path, "engine", model(models, "swa") | connector("ours"),
                 steps + [["metrics", "metrics"]], FLEXKV_CPU_CACHE_GB="8M",
                 FLEXKV_SSD_CACHE_GB="0.5", FLEXKV_SSD_CACHE_DIR=str(tmp_path / "ssd"),
                 FK_TEST_FAULT="read_error=0.05,read_flip=0.05")
    same_tokens(expected, result)
    assert result["metrics"]["failed_loads"] > 0, "no load failed: nothing was tested"


PARALLEL = [
    ["generate", "cold", [[[1, 700]], [[2, 300]]], 6], ["settle", 2], ["reset", False],
    ["generate", "hit", [[[1, 700]], [[2, 300]], [[1, 400], [3, 100]]], 6],
]


@pytest.mark.parametrize("kind", ["upstream", "ours"])
@pytest.mark.parametrize("size", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_parallel(kind: str, size: str, name: str, models: Path, reference: Any,
                  tmp_path: Path) -> None:
    """Two workers: each has its slices of a block, or both the same one (tensor parallel MLA)."""
    two: dict[str, Any] = {f"{size}_parallel_size": 2}
    if size == "pipeline":      # on a CPU it crashes in eager mode, also without any connector
        two |= {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    expected = reference(f"{size} {name}", name, PARALLEL, two)
    result = run(tmp_path, "engine", model(models, name) | connector(kind) | two, PARALLEL,
                 OMP_NUM_THREADS="1")
    same_tokens(expected, result)
    block = 16 if name == "mla" else BLOCK
    assert cached(result, "hit")[:2] == [700 // block * block, 300 // block * block]
