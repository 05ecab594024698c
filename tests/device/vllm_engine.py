#!/usr/bin/env python3
"""Real vLLM engines on the GPU machine: are tokens the same with FlexKV, and what does it cost and bring?

    . tests/device/env.sh && python3 tests/device/vllm_engine.py [--phases tokens,ttft,new,tp2]
                                                                 [--only WORDS] [--jobs N]

Phases, each within its own time (--seconds gives all of them another one):
    tokens  a small model with random weights: what is said after hits in FlexKV must be what is said after hits in the
            engine's own prefix cache, with both connectors, both model runners, eager and with CUDA graphs
    ttft    Llama 3.1 8B's shape: time to the first token of 8k and 32k prompts, computed, from the GPU, and loaded
    new     the same model, prompts that nobody has seen: what storing everything costs, against other connectors
    tp2     tokens and ttft with two GPUs

Every engine runs in processes of its own, which are killed when their time is up. $OUT/vllm.json gets all that was
found, $OUT/NAME.log what an engine said. Exit status 1 if tokens differ, or an engine failed.
$FLEXKV_CPU_CACHE_GB (20) is the size of the CPU tier, for the other connectors too. FlexKV's other settings are as the
environment has them: an embedded node, or a daemon.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "engine"))
import tiny_model  # noqa: E402

GIB = 1 << 30
TIER_GIB = int(os.environ.get("FLEXKV_CPU_CACHE_GB", "20"))
OUT = Path(os.environ.get("OUT", "."))
SECONDS = {"tokens": 420, "ttft": 540, "new": 480, "tp2": 480}
BLOCK = 16
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
}
LAYERWISE = {"FLEXKV_ENABLE_LAYERWISE_TRANSFER": "1"}
# The modes in which a load may be part of a step: see docs/vllm.md.
IN_STEP: dict[str, Any] = {"engine": {"async_scheduling": False}, "env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}


def transfer(connector: str) -> dict[str, Any] | None:
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if connector in ("ours", "layerwise"):
        return common | {"kv_connector": "FlexKVConnectorV1",
                         "kv_connector_module_path": "flexkv.integration.vllm.connector"}
    if connector == "upstream":
        return common | {"kv_connector": "FlexKVConnectorV1"}
    if connector in ("OffloadingConnector", "SimpleCPUOffloadConnector"):
        return {"kv_connector": connector, "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": TIER_GIB * GIB}}
    return None


# ---- engines, in processes of their own ----------------------------------------------------------

def token_ids(seed: int, count: int, vocabulary: int) -> list[int]:
    import random
    return random.Random(seed).choices(range(8, vocabulary), k=count)


class Engine:
    def __init__(self, connector: str, arguments: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        self.connector = connector
        self._parameters = SamplingParams
        self._small = 0
        start = time.monotonic()
        self.llm = LLM(**{"skip_tokenizer_init": True, "disable_log_stats": False, "seed": 0,
                          "max_num_batched_tokens": 8192, **arguments,
                          "kv_transfer_config": transfer(connector)})
        self.start_seconds = round(time.monotonic() - start, 1)

    def generate(self, prompts: list[list[int]], count: int) -> list[Any]:
        parameters = self._parameters(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)

    def settle(self) -> None:
        """What was computed has been stored, and nothing is copied any more."""
        self._small += 1
        self.generate([[9 + self._small] * 5], 1)
        time.sleep(0.6)

    def forget(self) -> None:
        """The engine's own prefix cache, once all is stored."""
        self.settle()
        end = time.monotonic() + 20
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > end:
                raise TimeoutError("the prefix cache can't be reset: blocks are in use for ever")
            self.generate([[9 + self._small] * 5], 1)
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix("vllm:")
            if hasattr(metric, "value") and ("flexkv" in name or "preempt" in name):
                found[name] = found.get(name, 0) + metric.value
        return found


def run_tokens(case: dict[str, Any], result: dict[str, Any]) -> None:
    """Lengths are no multiples of a block: a hit in FlexKV then leaves the same tokens to compute as one in the
    engine's own cache, so that the same kernels run on the same shapes, and bfloat16 gives the same bits."""
    engine = Engine(case["connector"], case["engine"])
    result["start_seconds"] = engine.start_seconds
    vocabulary = case["vocabulary"]
    prompts = [token_ids(i, blocks * BLOCK + rest, vocabulary)
               for i, (blocks, rest) in enumerate(((7, 3), (62, 9), (200, 5), (450, 11)))]
    prompts.append(prompts[1][:40 * BLOCK] + token_ids(9, 77 * BLOCK + 2, vocabulary))

    def say(name: str, prompts: list[list[int]]) -> list[list[int]]:
        outputs = [engine.generate([p], 48)[0] for p in prompts]
        result[name] = [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs]
        return [p + o["tokens"] for p, o in zip(prompts, result[name])]

    cold = say("cold", prompts)
    for name, again in (("hit", prompts), ("next", [c + token_ids(20 + i, 21, vocabulary)
                                                    for i, c in enumerate(cold)])):
        if case["connector"] != "none":
            engine.forget()
        say(name, again)
    if case["batch"]:
        if case["connector"] != "none":
            engine.forget()
        outputs = engine.generate([token_ids(i % 8, 700 + 37 * i, vocabulary) for i in range(16)], 100)
        result["batch"] = [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs]
    result["metrics"] = engine.metrics()


def run_ttft(case: dict[str, Any], result: dict[str, Any]) -> None:
    """Milliseconds; the first round of each size is not counted."""
    engine = Engine(case["connector"], case["engine"])
    result["start_seconds"] = engine.start_seconds

    def milliseconds(prompt: list[int], kind: str) -> None:
        start = time.monotonic()
        output = engine.generate([prompt], 1)[0]
        taken = 1e3 * (time.monotonic() - start)
        size.setdefault(kind, []).append(round(taken, 2))
        size.setdefault(kind + " cached", []).append(output.num_cached_tokens)

    for tokens in case["sizes"]:
        size = result[f"{tokens >> 10}k"] = {}
        for i in range(6):
            prompt = token_ids(tokens + i, tokens, case["vocabulary"])
            milliseconds(prompt, "cold")
            engine.settle()
            milliseconds(prompt, "gpu hit")
            engine.forget()
            milliseconds(prompt, "loaded")
        for kind in ("cold", "gpu hit", "loaded"):
            size[kind + " median"] = statistics.median(size[kind][1:])
    result["metrics"] = engine.metrics()


def run_new(case: dict[str, Any], result: dict[str, Any]) -> None:
    """Engines side by side in one GPU, in turns, and each round in another order. Seconds."""
    engines = []
    for connector in case["connectors"]:
        try:
            engines.append(Engine(connector, case["engine"]))
        except Exception as e:      # the others are worth measuring all the same
            result["error"] = f"{connector}: {e}"
    seconds: dict[str, list[float]] = {e.connector: [] for e in engines}
    for i in range(case["rounds"]):
        for engine in engines if i % 2 else engines[::-1]:
            prompts = [token_ids(1000 * i + j, case["tokens"], case["vocabulary"]) for j in range(64)]
            start = time.monotonic()
            engine.generate(prompts, 16)
            seconds[engine.connector].append(round(time.monotonic() - start, 3))
    base = statistics.mean(seconds["none"][1:]) if seconds.get("none") else None
    for engine in engines:
        counted = seconds[engine.connector][1:]
        mean = statistics.mean(counted)
        result[engine.connector] = {
            "start_seconds": engine.start_seconds, "rounds": counted, "mean": round(mean, 3),
            "vs none %": round(100 * (mean / base - 1), 2) if base else None}
    result["metrics"] = engines[-1].metrics()       # one registry for all of a process


def child(path: str) -> None:
    case = json.loads(Path(path).read_text())
    result: dict[str, Any] = {}
    try:
        {"tokens": run_tokens, "ttft": run_ttft, "new": run_new}[case["kind"]](case, result)
    except Exception as e:
        import traceback
        traceback.print_exc()
        result["error"] = f"{type(e).__name__}: {e}"
    Path(path).with_suffix(".result").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)         # engines in other processes may be slow to go


# ---- cases ---------------------------------------------------------------------------------------

def tokens_case(name: str, connector: str, model: Path, **more: Any) -> dict[str, Any]:
    engine = {"model": str(model), "dtype": "bfloat16", "max_model_len": 12288, "max_num_seqs": 1,
              "kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.1, **more.get("engine", {})}
    return {"name": name, "kind": "tokens", "connector": connector, "seconds": 150, "engine": engine,
            "env": {"FLEXKV_CPU_CACHE_GB": "2"} | more.get("env", {}), "batch": more.get("batch", False),
            "vocabulary": tiny_model.VOCAB}


def tokens_cases(model: Path) -> Iterator[dict[str, Any]]:
    for runner in ("1", "0"):
        for mode in ("eager", "graphs"):
            for connector in ("none", "ours", "upstream"):
                yield tokens_case(f"bf16-v{int(runner) + 1}-{mode}-{connector}", connector, model,
                                  engine={"enforce_eager": mode == "eager"},
                                  env={"VLLM_USE_V2_MODEL_RUNNER": runner})
    for mode in ("eager", "graphs"):
        yield tokens_case(f"bf16-v1-{mode}-layerwise", "layerwise", model,
                          engine={"enforce_eager": mode == "eager"} | IN_STEP["engine"],
                          env=LAYERWISE | IN_STEP["env"])
    # Many at once, in so few blocks that requests are preempted: other shapes, so not for bfloat16.
    few = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "num_gpu_blocks_override": 490,
           "max_model_len": 7680}
    for connector in ("none", "ours", "upstream"):
        yield tokens_case(f"f32-v2-eager-{connector}", connector, model, engine=few, batch=True,
                          env={"VLLM_USE_V2_MODEL_RUNNER": "1"})


def ttft_case(name: str, connector: str, model: Path, **more: Any) -> dict[str, Any]:
    engine = {"model": str(model), "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 40960,
              "kv_cache_memory_bytes": 30 * GIB, "gpu_memory_utilization": 0.3, **more.get("engine", {})}
    return {"name": name, "kind": "ttft", "connector": connector, "seconds": 170, "engine": engine,
            "env": more.get("env", {}), "sizes": [8192, 32768], "vocabulary": LLAMA_8B["vocab_size"]}


def ttft_cases(model: Path) -> Iterator[dict[str, Any]]:
    for connector in ("none", "ours"):
        yield ttft_case(f"ttft-{connector}", connector, model)
    yield ttft_case("ttft-layerwise", "layerwise", model, engine=IN_STEP["engine"], env=LAYERWISE | IN_STEP["env"])
    for connector in ("OffloadingConnector", "SimpleCPUOffloadConnector"):
        yield ttft_case(f"ttft-{connector}", connector, model)


def new_cases(model: Path) -> Iterator[dict[str, Any]]:
    engine = {"model": str(model), "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 40960,
              "kv_cache_memory_bytes": 10 * GIB, "gpu_memory_utilization": 0.2}
    yield {"name": "new", "kind": "new", "seconds": SECONDS["new"], "engine": engine, "env": {}, "rounds": 5,
           "tokens": 4096, "vocabulary": LLAMA_8B["vocab_size"],
           "connectors": ["none", "ours", "OffloadingConnector", "SimpleCPUOffloadConnector"]}


def tp2_cases(small: Path, large: Path) -> Iterator[dict[str, Any]]:
    two = {"tensor_parallel_size": 2}
    for connector in ("none", "ours"):
        yield tokens_case(f"tp2-bf16-v2-eager-{connector}", connector, small, engine=two | {"enforce_eager": True})
    for connector in ("none", "ours"):
        yield ttft_case(f"tp2-ttft-{connector}", connector, large, engine=two)


# ---- the runs ------------------------------------------------------------------------------------

def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def run_case(case: dict[str, Any], folder: Path, until: float) -> dict[str, Any]:
    limit = min(case["seconds"], until - time.monotonic())
    if limit < 20:
        return {"error": "not run: the phase's time is up"}
    path = folder / (case["name"] + ".json")
    path.write_text(json.dumps(case))
    log = OUT / (case["name"] + ".log")
    start = time.monotonic()
    with open(log, "wb") as f:
        process = subprocess.Popen(
            [sys.executable, str(HERE), "--child", str(path)], stdout=f, stderr=subprocess.STDOUT,
            start_new_session=True, env=os.environ | {"FLEXKV_CPU_CACHE_GB": str(TIER_GIB)} | case["env"])
        try:
            process.wait(limit)
            error = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            error = f"killed after {limit:.0f} s"
        finally:
            kill_session(process.pid)       # its engines as well
            process.wait()
    written = path.with_suffix(".result")
    result = json.loads(written.read_text()) if written.exists() else {"error": error}
    result["seconds"] = round(time.monotonic() - start, 1)
    say(f"{case['name']}: {result.get('error', 'done')} ({result['seconds']} s)")
    if "error" in result:
        print(log.read_text(errors="replace")[-3000:], flush=True)
    return result


def kill_session(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        pass


def compare(base: dict[str, Any], other: dict[str, Any], exact: bool) -> dict[str, Any]:
    """exact: outputs are comparable only where the same number of tokens was computed."""
    found: dict[str, Any] = {"good": True, "rounds": {}}
    for name in ("cold", "hit", "next", "batch"):
        if name not in base or name not in other:
            continue
        pairs = list(zip(base[name], other[name]))
        alike = [(a, b) for a, b in pairs if not exact or a["cached"] == b["cached"]]
        equal = sum(a["tokens"] == b["tokens"] for a, b in alike)
        found["rounds"][name] = {"equal": equal, "comparable": len(alike), "of": len(pairs),
                                 "cached": [b["cached"] for _, b in pairs]}
        hits = name != "hit" or all(b["cached"] > 0 for _, b in pairs)
        found["good"] &= equal == len(alike) and hits and bool(alike)
    found["good"] &= "hit" in found["rounds"]
    return found


def compare_tokens(results: dict[str, Any]) -> dict[str, Any]:
    """Against the engine without a connector and otherwise the same."""
    found = {}
    for name, result in results.items():
        start, _, connector = name.rpartition("-")
        base = results.get(start + "-none")
        if connector == "none" or base is None or "cold" not in result or "cold" not in base:
            continue
        found[name] = compare(base, result, exact="f32" not in name)
        say(f"{name}: {'equal' if found[name]['good'] else 'DIFFERENT'} {json.dumps(found[name]['rounds'])}")
    return found


def run_phase(phase: str, cases: list[dict[str, Any]], folder: Path, seconds: float, jobs: int) -> dict[str, Any]:
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip((c["name"] for c in cases), pool.map(lambda c: run_case(c, folder, until), cases)))
    summary: dict[str, Any] = {"results": results}
    if phase in ("tokens", "tp2"):
        summary["tokens"] = compare_tokens(results)
    return summary


def short(summary: dict[str, Any]) -> dict[str, Any]:
    """Without what each output was."""
    lists = ("cold", "hit", "next", "batch")
    return {phase: found | {"results": {
        name: {k: v for k, v in result.items() if k not in lists} for name, result in found["results"].items()}}
        for phase, found in summary.items()}


def failed(summary: dict[str, Any]) -> bool:
    return any("error" in r for found in summary.values() for r in found["results"].values()) or any(
        not t["good"] for found in summary.values() for t in found.get("tokens", {}).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="tokens", help="of tokens,ttft,new,tp2")
    parser.add_argument("--only", default="", help="cases whose names hold one of these words, comma separated")
    parser.add_argument("--jobs", type=int, default=4, help="engines with the small model at a time")
    parser.add_argument("--seconds", type=float, help="for each phase")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
    phases = options.phases.split(",")
    if unknown := set(phases) - set(SECONDS):
        parser.error(f"no such phase: {', '.join(unknown)}")

    OUT.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = tiny_model.write("gpu", folder / "small"), folder / "llama-8b"
        large.mkdir()
        tiny_model.write_json(large / "config.json", LLAMA_8B)
        cases = {"tokens": list(tokens_cases(small)), "ttft": list(ttft_cases(large)),
                 "new": list(new_cases(large)), "tp2": list(tp2_cases(small, large))}
        for phase in phases:
            wanted = [c for c in cases[phase] if any(w in c["name"] for w in options.only.split(","))]
            jobs = options.jobs if phase == "tokens" else 1
            summary[phase] = run_phase(phase, wanted, folder, options.seconds or SECONDS[phase], jobs)
            (OUT / "vllm.json").write_text(json.dumps(summary))
    print(json.dumps(short(summary), indent=1))
    return int(failed(summary))


if __name__ == "__main__":
    sys.exit(main())
