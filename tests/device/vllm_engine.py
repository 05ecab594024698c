#!/usr/bin/env python3
"""Real vLLM engines on the GPU machine: are tokens the same with FlexKV, and what does it cost and bring?

    . tests/device/env.sh && python3 tests/device/vllm_engine.py [--phases tokens,ttft,new,tp2,ssd]
                                                                 [--only WORDS] [--jobs N] [--ssd-dir DIR,...]

Phases, each within its own time (--seconds gives all of them another one):
    tokens  a small model with random weights: what is said after hits in FlexKV must be what is said after hits in the
            engine's own prefix cache, with both connectors, both model runners, eager and with CUDA graphs
    ttft    Llama 3.1 8B's shape: time to the first token of 8k and 32k prompts, computed, from the GPU, and loaded;
            without FlexKV, with it, and with other connectors, all engines side by side, one after the other
    new     the same, prompts that nobody has seen: what storing everything costs. With ttft: the same engines
    tp2     tokens and ttft with two GPUs
    ssd     time to the first token of prompts that only the SSD tier has, with its files in DIR; an engine for each DIR.
            With tp2: on a GPU of its own, where there is one

Every engine runs in processes of its own, which are killed when their time is up. $OUT/vllm.json gets all that was
found, $OUT/NAME.log what an engine said. Exit status 1 if tokens differ, or an engine failed.
$FLEXKV_CPU_CACHE_GB (16) is the size of the CPU tier, for the other connectors too. FlexKV's other settings are as the
environment has them: an embedded node, or a daemon.
"""
import argparse
import json
import os
import select
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
TIER_GIB = int(os.environ.get("FLEXKV_CPU_CACHE_GB", "16"))
OUT = Path(os.environ.get("OUT", "."))
SECONDS = {"tokens": 420, "ttft": 400, "new": 400, "tp2": 480, "ssd": 300}
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
ROUNDS, NEW_ROUNDS = 6, 9       # the first ones are not counted
SSD_CPU_GIB, SSD_GIB = 5, 40    # less than the prompts of a size, and more than all
START_SECONDS = 200
SETTLED_SECONDS = 0.6
TIE = 0.02              # of logits around 3
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


def batch_prompts(vocabulary: int) -> list[list[int]]:
    return [token_ids(i % 8, 700 + 37 * i, vocabulary) for i in range(16)]


class Engine:
    def __init__(self, connector: str, arguments: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        self.connector = connector
        self._parameters = SamplingParams
        self._small = 0
        self._pinned: Any = None
        start = time.monotonic()
        self.llm = LLM(**{"skip_tokenizer_init": True, "disable_log_stats": False, "seed": 0,
                          "max_num_batched_tokens": 8192, **arguments,
                          "kv_transfer_config": transfer(connector)})
        self.start_seconds = round(time.monotonic() - start, 1)

    def generate(self, prompts: list[list[int]], count: int) -> list[Any]:
        parameters = self._parameters(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)

    def nudge(self) -> None:
        """A step: in it the engine hears what has been stored."""
        self._small += 1
        self.generate([[9 + self._small] * 5], 1)

    def forget(self) -> None:
        """The engine's own prefix cache, once all is stored."""
        end = time.monotonic() + 20
        self.nudge()
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > end:
                raise TimeoutError("the prefix cache can't be reset: blocks are in use for ever")
            time.sleep(0.1)
            self.nudge()

    def settle(self) -> None:
        """What was computed has been stored, and nothing is copied any more."""
        self.nudge()
        time.sleep(SETTLED_SECONDS)

    def first_token(self, seed: int, tokens: int) -> list[float]:
        """Milliseconds, and how many tokens were not computed."""
        prompt = token_ids(seed, tokens, LLAMA_8B["vocab_size"])
        start = time.monotonic()
        output = self.generate([prompt], 1)[0]
        taken = 1e3 * (time.monotonic() - start)
        self.nudge()
        return [round(taken, 2), output.num_cached_tokens]

    def all_new(self, seed: int, tokens: int) -> float:
        """Seconds for 64 prompts."""
        prompts = [token_ids(seed + i, tokens, LLAMA_8B["vocab_size"]) for i in range(64)]
        start = time.monotonic()
        self.generate(prompts, 16)
        return round(time.monotonic() - start, 3)

    def bus(self) -> list[float]:
        """GB/s to the GPU and from it, of one large copy of pinned memory."""
        import torch
        if self._pinned is None:
            self._pinned = (torch.empty(GIB, dtype=torch.uint8, pin_memory=True),
                            torch.empty(GIB, dtype=torch.uint8, device="cuda"))
        rates = []
        for target, source in (self._pinned[::-1], self._pinned):
            times = []
            for _ in range(3):
                start = time.monotonic()
                target.copy_(source)
                torch.cuda.synchronize()
                times.append(time.monotonic() - start)
            rates.append(round(GIB / 1e9 / min(times), 1))
        return rates

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
            engine.settle()
            engine.forget()
        say(name, again)
    if case["batch"]:
        if case["connector"] != "none":
            engine.settle()
            engine.forget()
        outputs = engine.generate(batch_prompts(vocabulary), 100)
        result["batch"] = [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs]
    result["metrics"] = engine.metrics()


def serve(case: dict[str, Any], result: dict[str, Any]) -> None:
    """Does what the parent says, one command at a time."""
    def answer(value: Any) -> None:
        os.write(case["replies"], json.dumps(value).encode() + b"\n")

    engine = Engine(case["connector"], case["engine"])
    answer(engine.start_seconds)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer(getattr(engine, name)(*arguments))


def child(path: str) -> None:
    case = json.loads(Path(path).read_text())
    result: dict[str, Any] = {}
    try:
        {"tokens": run_tokens, "serve": serve}[case["kind"]](case, result)
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


def large_case(name: str, connector: str, model: Path, **more: Any) -> dict[str, Any]:
    """Five of them fit into one GPU."""
    engine = {"model": str(model), "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 40960,
              "kv_cache_memory_bytes": 8 * GIB, "gpu_memory_utilization": 0.1, "max_num_seqs": 64,
              **more.get("engine", {})}
    return {"name": name, "kind": "serve", "connector": connector, "engine": engine, "env": more.get("env", {})}


def large_cases(model: Path) -> Iterator[dict[str, Any]]:
    for connector in ("none", "ours", "OffloadingConnector", "SimpleCPUOffloadConnector"):
        yield large_case(connector, connector, model)
    yield large_case("layerwise", "layerwise", model, engine=IN_STEP["engine"], env=LAYERWISE | IN_STEP["env"])


def tp2_cases(small: Path, large: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    two = {"tensor_parallel_size": 2}
    return ([tokens_case(f"tp2-bf16-v2-eager-{connector}", connector, small, engine=two | {"enforce_eager": True})
             for connector in ("none", "ours")],
            [large_case(f"tp2-{connector}", connector, large, engine=two) for connector in ("none", "ours")])


def ssd_cases(model: Path, dirs: list[str], gpu: str | None) -> Iterator[dict[str, Any]]:
    for i, path in enumerate(dirs):
        yield large_case(f"ssd-{i}", "ours", model, env={
            "FLEXKV_CPU_CACHE_GB": str(SSD_CPU_GIB), "FLEXKV_SSD_CACHE_GB": str(SSD_GIB),
            "FLEXKV_SSD_CACHE_DIR": path, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})})


# ---- the runs ------------------------------------------------------------------------------------

def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def start_child(case: dict[str, Any], path: Path, log: Any, **more: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, str(HERE), "--child", str(path)], stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True, env=os.environ | {"FLEXKV_CPU_CACHE_GB": str(TIER_GIB)} | case["env"], **more)


def run_case(case: dict[str, Any], folder: Path, until: float) -> dict[str, Any]:
    limit = min(case["seconds"], until - time.monotonic())
    if limit < 20:
        return {"error": "not run: the phase's time is up"}
    path = folder / (case["name"] + ".json")
    path.write_text(json.dumps(case))
    log = OUT / (case["name"] + ".log")
    start = time.monotonic()
    with open(log, "wb") as f:
        process = start_child(case, path, f)
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


class Asked:
    """An engine in a process of its own that does what it is asked to. After its first failure it is gone."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        self.name = case["name"]
        self.result: dict[str, Any] = {}
        self._log = OUT / (self.name + ".log")
        path = folder / (self.name + ".json")
        replies, end = os.pipe()
        case["env"] |= {"VLLM_CACHE_ROOT": str(folder / self.name)}     # they compile at the same time
        path.write_text(json.dumps(case | {"replies": end}))
        with open(self._log, "wb") as f:
            self._process = start_child(case, path, f, stdin=subprocess.PIPE, pass_fds=(end,))
        os.close(end)
        self._replies = open(replies, "rb")

    @property
    def good(self) -> bool:
        return "error" not in self.result

    def answer(self, seconds: float) -> Any:
        ready, _, _ = select.select([self._replies], [], [], max(0, seconds))
        line = self._replies.readline() if ready else b""
        if not line:
            self.result["error"] = "it has ended" if ready else f"no answer in {seconds:.0f} s"
            say(f"{self.name}: {self.result['error']}")
            print(self._log.read_text(errors="replace")[-3000:], flush=True)
            self.end()
            return None
        return json.loads(line)

    def ask(self, name: str, *arguments: Any) -> Any:
        if not self.good:
            return None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return self.answer(60)

    def end(self) -> None:
        kill_session(self._process.pid)
        self._process.wait()


def ask_ttft(engines: list[Asked], until: float) -> None:
    """One after the other, nothing being copied for the others."""
    for engine in engines:
        engine.result["bus"] = []
        for tokens in (8192, 32768):
            size: dict[str, Any] = engine.result.setdefault(f"{tokens >> 10}k", {})
            engine.result["bus"].append(engines[0].ask("bus"))
            for i in range(ROUNDS):
                if time.monotonic() > until:
                    engine.result.setdefault("error", "the phase's time is up")
                for kind in ("cold", "gpu hit", "loaded"):
                    if kind == "loaded":
                        engine.ask("forget")
                    asked = engine.ask("first_token", tokens + i, tokens)
                    if asked is not None:
                        size.setdefault(kind, []).append(asked[0])
                        size.setdefault(kind + " cached", []).append(asked[1])
                    if kind != "loaded":
                        time.sleep(SETTLED_SECONDS)
            if engine.good:
                size["median"] = {kind: statistics.median(size[kind][1:]) for kind in ("cold", "gpu hit", "loaded")}


def ask_ssd(engines: list[Asked], until: float) -> None:
    """All prompts of a size, then all again: each of them has been pushed out of the CPU tier by then."""
    for engine in engines:
        for tokens in (8192, 32768):
            size: dict[str, Any] = engine.result.setdefault(f"{tokens >> 10}k", {})
            for kind in ("cold", "from SSD"):
                for i in range(ROUNDS):
                    if time.monotonic() > until:
                        engine.result.setdefault("error", "the phase's time is up")
                        return
                    if kind != "cold":
                        engine.ask("forget")
                    asked = engine.ask("first_token", 7 * tokens + i, tokens)
                    if asked is not None:
                        size.setdefault(kind, []).append(asked[0])
                        size.setdefault(kind + " cached", []).append(asked[1])
                engine.ask("settle")
            if engine.good:
                size["median"] = {kind: statistics.median(size[kind][1:]) for kind in ("cold", "from SSD")}


def ask_new(engines: list[Asked], until: float) -> None:
    seconds: dict[str, list[float]] = {e.name: [] for e in engines}
    for i in range(NEW_ROUNDS):
        for engine in engines if i % 2 else engines[::-1]:
            taken = engine.ask("all_new", 1000000 + 1000 * i, 4096) if time.monotonic() < until else None
            if taken is not None:
                seconds[engine.name].append(taken)
    rounds = min(len(s) for s in seconds.values())
    base = statistics.mean(seconds["none"][1:rounds]) if seconds.get("none") and rounds > 1 else None
    for engine in engines:
        counted = seconds[engine.name][1:rounds]
        mean = statistics.mean(counted) if counted else 0
        engine.result["new"] = {"rounds": counted, "mean": round(mean, 3),
                                "vs none %": round(100 * (mean / base - 1), 2) if base else None}


def run_large(phases: list[str], cases: list[dict[str, Any]], folder: Path, seconds: float) -> dict[str, Any]:
    """The engines start together: their starts load the machine, what is measured comes after."""
    until = time.monotonic() + seconds
    engines = [Asked(case, folder) for case in cases]
    try:
        for engine in engines:
            engine.result["start_seconds"] = engine.answer(min(START_SECONDS, until - time.monotonic()))
        say("started: " + ", ".join(e.name for e in engines if e.good))
        good = [e for e in engines if e.good]
        sides = [e for e in good if not e.name.startswith("ssd-")]
        if "ttft" in phases and sides:
            ask_ttft(sides, until)
        if "new" in phases and good:
            ask_new([e for e in sides if e.name != "layerwise"], until)
        if "ssd" in phases:
            ask_ssd([e for e in good if e not in sides], until)
        for engine in good:
            engine.result["metrics"] = engine.ask("metrics")
    finally:
        for engine in engines:
            engine.end()
    return {"results": {e.name: e.result for e in engines}}


def is_tie(model: Path, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Are the first tokens in which they differ as likely, computed exactly? Attention kernels of GPUs multiply float32
    with ten bits, so that the order of sums, which depends on what was cached, decides between such tokens."""
    import torch
    from transformers import LlamaForCausalLM
    at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    exact = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = exact(torch.tensor([prompt + one[:at]])).logits[0, -1]
    best, value = int(logits.argmax()), float(logits.max())
    gap = value - min(float(logits[one[at]]), float(logits[other[at]]))
    say(f"token {at}: {one[at]} or {other[at]}, exactly {best}, {gap:.4f} of {value:.1f} between them")
    return best in (one[at], other[at]) and gap < TIE


def compare(base: dict[str, Any], other: dict[str, Any], exact: bool, model: Path) -> dict[str, Any]:
    """exact: outputs are comparable only where the same number of tokens was computed. Of a batch they are the same,
    or part at a tie."""
    found: dict[str, Any] = {"good": True, "rounds": {}}
    for name in ("cold", "hit", "next", "batch"):
        if name not in base or name not in other:
            continue
        pairs = list(zip(base[name], other[name]))
        alike = [(a, b) for a, b in pairs if not exact or a["cached"] == b["cached"]]
        equal = sum(a["tokens"] == b["tokens"] for a, b in alike)
        ties = 0
        if name == "batch" and equal < len(alike):
            ties = sum(a["tokens"] != b["tokens"] and is_tie(model, p, a["tokens"], b["tokens"])
                       for p, (a, b) in zip(batch_prompts(tiny_model.VOCAB), pairs))
        found["rounds"][name] = {"equal": equal, "ties": ties, "comparable": len(alike), "of": len(pairs),
                                 "cached": [b["cached"] for _, b in pairs]}
        hits = name != "hit" or all(b["cached"] > 0 for _, b in pairs)
        found["good"] &= equal + ties == len(alike) and hits and bool(alike)
    found["good"] &= "hit" in found["rounds"]
    return found


def compare_tokens(results: dict[str, Any], model: Path) -> dict[str, Any]:
    """Against the engine without a connector and otherwise the same."""
    found = {}
    for name, result in results.items():
        start, _, connector = name.rpartition("-")
        base = results.get(start + "-none")
        if connector == "none" or base is None or "cold" not in result or "cold" not in base:
            continue
        found[name] = compare(base, result, "f32" not in name, model)
        say(f"{name}: {'equal' if found[name]['good'] else 'DIFFERENT'} {json.dumps(found[name]['rounds'])}")
    return found


def run_tokens_phase(cases: list[dict[str, Any]], folder: Path, seconds: float, jobs: int) -> dict[str, Any]:
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip((c["name"] for c in cases), pool.map(lambda c: run_case(c, folder, until), cases)))
    return {"results": results, "tokens": compare_tokens(results, folder / "small")}


def short(summary: dict[str, Any]) -> dict[str, Any]:
    """Without what each output was."""
    lists = ("cold", "hit", "next", "batch")
    return {phase: found | {"results": {
        name: {k: v for k, v in result.items() if k not in lists} for name, result in found["results"].items()}}
        for phase, found in summary.items()}


def gpus() -> int:
    """Without CUDA in this process."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def failed(summary: dict[str, Any]) -> bool:
    return any("error" in r for found in summary.values() for r in found["results"].values()) or any(
        not t["good"] for found in summary.values() for t in found.get("tokens", {}).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="tokens", help="of tokens,ttft,new,tp2,ssd")
    parser.add_argument("--ssd-dir", default="/tmp/flexkv-ssd", help="directories of the phase ssd, comma separated")
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
        tokens = list(tokens_cases(small))
        sides = list(large_cases(large))
        if "tp2" in phases:
            tokens, sides = tp2_cases(small, large)
        elif not {"ttft", "new"} & set(phases):
            sides = []
        if "ssd" in phases:
            free = "2" if "tp2" in phases and gpus() > 2 else None
            sides += ssd_cases(large, options.ssd_dir.split(","), free)
        tokens, sides = ([c for c in cases if any(w in c["name"] for w in options.only.split(","))]
                         for cases in (tokens, sides))

        def keep(name: str, found: dict[str, Any]) -> None:
            summary[name] = found
            (OUT / "vllm.json").write_text(json.dumps(summary))

        def limit(phases: list[str]) -> float:
            return options.seconds or sum(SECONDS[p] for p in phases)

        if {"tokens", "tp2"} & set(phases) and tokens:
            keep("tokens", run_tokens_phase(tokens, folder, limit(["tokens"]), options.jobs))
        asked = ["ttft" if p == "tp2" else p for p in phases if p != "tokens"]
        if asked and sides:
            keep(",".join(asked), run_large(asked, sides, folder, limit(asked)))
    print(json.dumps(short(summary), indent=1))
    return int(failed(summary))


if __name__ == "__main__":
    sys.exit(main())
