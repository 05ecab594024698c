#!/usr/bin/env python3
"""Runs one engine through a list of steps and writes down what came out.

    python vllm_run.py PLAN.json RESULT.json

A plan: {"engine": arguments of vllm.LLM, "steps": [[kind, ...], ...]}. Kinds of steps:
    ["generate", name, prompts, max_tokens]     a batch of prompts
    ["abort", name, prompts, max_tokens, after] the same, but all are aborted after so many steps
    ["reset", connector]                        the engine's prefix cache, and FlexKV's if true
    ["settle", seconds]                         time for stores under way to end
    ["metrics", name]                           FlexKV's counters as the engine publishes them
A prompt is a list of parts: [seed, tokens] stands for so many token ids that follow from the seed,
["out", name, i] for what the i-th prompt of an earlier generate was and what came out.
A result: {name: [{"tokens", "cached", "reason"}, ...]}, and the seconds each step took under
"seconds". Run by the tests, which say what must be equal to what.
"""
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FIRST_WORD, VOCAB = 8, 2048
RESET_TIMEOUT = 60.0


def token_ids(seed: int, count: int) -> list[int]:
    ids = []
    state = (seed * 2654435761 + 12345) & 0xFFFFFFFF
    for _ in range(count):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        ids.append(FIRST_WORD + (state >> 8) % (VOCAB - FIRST_WORD))
    return ids


class Run:
    def __init__(self, engine: dict[str, Any]) -> None:
        from vllm import LLM
        self.llm = LLM(**{"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
                          "disable_log_stats": False, "seed": 0,
                          "gpu_memory_utilization": 0.4, **engine})
        self.result: dict[str, Any] = {"seconds": {}}
        self.done: dict[str, list[list[int]]] = {}      # prompt and output, as token ids
        self.count = 0

    def prompt(self, parts: list[list[Any]]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += self.done[part[1]][part[2]] if part[0] == "out" else token_ids(*part)
        return ids

    def parameters(self, max_tokens: int) -> Any:
        from vllm import SamplingParams
        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True,
                              detokenize=False)

    def generate(self, name: str, prompts: list[Any], max_tokens: int) -> None:
        ids = [self.prompt(p) for p in prompts]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in ids],
                                    self.parameters(max_tokens), use_tqdm=False)
        self.result[name] = [{
            "tokens": list(o.outputs[0].token_ids),
            "cached": o.num_cached_tokens,
            "reason": o.outputs[0].finish_reason,
        } for o in outputs]
        self.done[name] = [p + o["tokens"] for p, o in zip(ids, self.result[name])]

    def abort(self, name: str, prompts: list[Any], max_tokens: int, after: int) -> None:
        engine = self.llm.llm_engine
        ids = []
        for p in prompts:
            self.count += 1
            ids.append(f"abort-{self.count}")
            engine.add_request(ids[-1], {"prompt_token_ids": self.prompt(p)},
                               self.parameters(max_tokens))
        for _ in range(after):
            engine.step()
        engine.abort_request(ids)
        while engine.has_unfinished_requests():
            engine.step()
        self.result[name] = []

    def reset(self, connector: bool) -> None:
        """Blocks that stores still read are in use: the engine can't reset then."""
        end = time.monotonic() + RESET_TIMEOUT
        while not self.llm.reset_prefix_cache(reset_connector=connector):
            if time.monotonic() > end:
                raise TimeoutError("the prefix cache can't be reset: blocks are in use for ever")
            self.settle(0.1)

    def settle(self, seconds: float) -> None:
        """An engine in a process of its own goes on stepping; one in this process must be told."""
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            self.count += 1
            self.llm.generate([{"prompt_token_ids": [FIRST_WORD + self.count % 1000]}],
                              self.parameters(1), use_tqdm=False)
        time.sleep(seconds)

    def metrics(self, name: str) -> None:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if not hasattr(metric, "value"):
                continue
            if "flexkv" in metric.name or "preemptions" in metric.name:
                key = metric.name.removeprefix("vllm:").removeprefix("flexkv_")
                found[key] = found.get(key, 0) + metric.value
            elif "by_source" in metric.name:
                key = "source_" + metric.labels["source"]
                found[key] = found.get(key, 0) + metric.value
        self.result[name] = found


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    start = time.monotonic()
    run = Run(plan["engine"])
    seconds = run.result["seconds"]
    seconds["start"] = round(time.monotonic() - start, 1)
    for kind, *arguments in plan["steps"]:
        start = time.monotonic()
        getattr(run, kind)(*arguments)
        name = arguments[0] if isinstance(arguments[0], str) else kind
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - start, 4)
    Path(sys.argv[2]).write_text(json.dumps(run.result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
