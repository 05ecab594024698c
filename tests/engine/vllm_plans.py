"""What the engine tests have engines do, and how an engine is run: shared by the test files."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_model

HERE = Path(__file__).parent
START_TIMEOUT = 420.0       # of a whole run; two shared cores may be slow
BLOCK = 32                  # tokens; the least that vLLM's attention on a CPU takes

Steps = list[list[Any]]


# ---- plans ---------------------------------------------------------------------------------------

def basics(block: int = BLOCK) -> Steps:
    """Cold, hit, partly a hit, whole prompts that fill their last block, batches, resets."""
    three = [[[1, 33 * block]], [[2, 15 * block + 20]], [[1, 20 * block], [3, 10 * block]]]
    return [
        ["generate", "cold", three, 24],
        ["reset", False],
        ["generate", "hit", three, 24],
        ["generate", "local", [[[1, 33 * block]]], 24],
        ["reset", False],
        ["generate", "exact", [[[1, 30 * block]]], 24],
        ["reset", False],
        ["generate", "less", [[[1, 30 * block - 1]], [[1, 30 * block + 1]]], 24],
        ["generate", "more", [[[1, 33 * block], [5, 15 * block]]], 24],
        ["reset", False],
        ["generate", "batch", [[[1, 24 * block], [seed, 70 + seed]] for seed in range(10, 18)], 16],
        ["reset", False],
        ["generate", "again", [[["out", "batch", i]] for i in range(8)], 16],
        ["reset", False],
        ["generate", "short", [[[1, 5]], [[1, block]], [[1, block + 1]], [[7, 2]]], 8],
    ]


def conversations(count: int, turns: int, shared: int = 150, said: int = 60,
                  answer: int = 24) -> Steps:
    """Each turn of a conversation is what was said before, the answer, and something new; some
    conversations share a system prompt. The engine's own cache is dropped between turns."""
    steps: Steps = []
    for turn in range(turns):
        prompts = []
        for c in range(count):
            new = [1000 * (c + 1) + turn, said + 7 * c % 90]
            if turn == 0:
                prompts.append([[c % 3, shared], new])
            else:
                prompts.append([["out", f"turn{turn - 1}", c], new])
        steps.append(["generate", f"turn{turn}", prompts, answer])
        steps.append(["reset", False])
    return steps


# ---- engines -------------------------------------------------------------------------------------

def connector(kind: str, policy: str = "recompute", **more: Any) -> dict[str, Any]:
    """The engine's arguments for a connector: upstream is the one that comes with vLLM."""
    if kind == "none":
        return {}
    transfer = {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both",
                "kv_load_failure_policy": policy, **more}
    if kind == "ours":
        transfer["kv_connector_module_path"] = "flexkv.integration.vllm.connector"
    return {"kv_transfer_config": transfer}


def environment(**more: str) -> dict[str, str]:
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "FLEXKV_CPU_CACHE_GB": "0.5",
    }
    return {**os.environ, **env, **more}


class Failed(Exception):
    """An engine that did not end well; the text has the end of its log."""


def start(folder: Path, name: str, engine: dict[str, Any], steps: Steps,
          **env: str) -> subprocess.Popen[bytes]:
    """An engine in the background, in a process group of its own."""
    plan = folder / f"{name}.plan.json"
    plan.write_text(json.dumps({"engine": engine, "steps": steps}))
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "vllm_run.py"), str(plan), str(folder / f"{name}.json")],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
            env=environment(**env))


def finish(process: subprocess.Popen[bytes], folder: Path, name: str,
           timeout: float = START_TIMEOUT) -> dict[str, Any]:
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"{name} hangs; {tail(folder, name)}") from None
    finally:
        stop(process)
    if process.returncode:
        raise Failed(f"{name} ended with {process.returncode}; {tail(folder, name)}")
    return json.loads((folder / f"{name}.json").read_text())


def stop(process: subprocess.Popen[bytes]) -> None:
    """What is left of the engine's processes. They are all in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(folder: Path, name: str, engine: dict[str, Any], steps: Steps, **env: str
        ) -> dict[str, Any]:
    return finish(start(folder, name, engine, steps, **env), folder, name)


def log(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text(errors="replace")


def tail(folder: Path, name: str, lines: int = 60) -> str:
    return "end of its log:\n" + "\n".join(log(folder, name).splitlines()[-lines:])


# On a CPU, vLLM 0.32 turns the queries of MLA by wrong angles, and by others in each batch, if rotary
# embeddings are plain ones: its kernel takes a strided view for a dense tensor. Scaled ones it
# computes in torch, rightly.
YARN = {"rope_type": "deepseek_yarn", "rope_theta": 10000.0, "factor": 2.0,
        "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}


# ---- models --------------------------------------------------------------------------------------

def model(folder: Path, kind: str) -> dict[str, Any]:
    """The engine's arguments for a tiny model, which is written if it is not there."""
    path = folder / kind
    if not (path / "model.safetensors").exists():
        tiny_model.write(kind, path)
    arguments: dict[str, Any] = {"model": str(path), "max_model_len": 4096,
                                 "max_num_batched_tokens": 4096}
    if kind == "mla":           # which has its own block size
        arguments["hf_overrides"] = {"rope_parameters": YARN}
    else:
        arguments["block_size"] = BLOCK
    return arguments


# ---- results -------------------------------------------------------------------------------------

def same_tokens(expected: dict[str, Any], result: dict[str, Any]) -> None:
    for name, outputs in expected.items():
        if not isinstance(outputs, list):
            continue
        for i, (want, have) in enumerate(zip(outputs, result[name], strict=True)):
            assert have["reason"] == want["reason"], f"{name}[{i}] ended for {have['reason']}"
            assert have["tokens"] == want["tokens"], (
                f"{name}[{i}] ({have['cached']} tokens from caches) has other tokens")


def cached(result: dict[str, Any], name: str) -> list[int]:
    return [output["cached"] for output in result[name]]
