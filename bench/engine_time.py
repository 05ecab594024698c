"""Time per request of the real vLLM with and without FlexKV; parts of engine.py."""
import tempfile
from pathlib import Path
from typing import Any

import engine_table as table
from engine_child import EngineChild

PROMPT = 4096
SSD_PROMPTS_IN_CPU = 3          # what the cpu tier holds where hits are to come from the SSD
CONNECTORS = {"none": "no connector", "upstream": "vLLM's own connector class", "ours": "FlexKV's connector class"}


class Engines:
    """Engines of one model; all of them are ended with it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.started: list[EngineChild] = []

    def start(self, name: str, kind: str, **env: str) -> EngineChild:
        from vllm_plans import connector, model
        arguments: dict[str, Any] = model(self.folder, "gqa") | connector(kind) | {
            "dtype": self.dtype, "max_model_len": 8192, "max_num_batched_tokens": 8192}
        self.started.append(EngineChild(self.folder / f"{name}.log", arguments, env))
        return self.started[-1]

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.started:
            child.close()


def block_bytes(dtype: str) -> int:
    """Of a token in all layers of the tiny model."""
    return 4 * 2 * 4 * 64 * (4 if dtype == "float32" else 2)


# ---- time to first token -------------------------------------------------------------------------

def ask(engine: EngineChild, seed: int, tokens: int, answer: int = 1) -> tuple[float, int]:
    """Seconds, and tokens that were in caches."""
    done = engine.do("generate", "ask", [[[seed, tokens]]], answer)
    return done["seconds"], done["result"][0]["cached"]


def first_token(dtype: str, prompts: int) -> None:
    rows = []
    for kind in ("upstream", "ours"):
        with tempfile.TemporaryDirectory(prefix="fk-bench-") as folder, Engines(Path(folder), dtype) as engines:
            rows += _tiers(engines, kind, prompts)
    table.show(f"Time to first token, prompt of {PROMPT} tokens, {dtype} (seconds)",
               ("", "n", "median", "quartiles", "to computing", "bar"), rows,
               ("The engine's own cache is dropped before each hit, but for the row that shows it.",))


def _tiers(engines: Engines, kind: str, prompts: int) -> list[tuple[str, ...]]:
    in_cpu = engines.start(f"{kind}-cpu", kind, FLEXKV_CPU_CACHE_GB=str((prompts + 4) * PROMPT * block_bytes(
        engines.dtype) / 2**30)).ready()
    computed, own, cpu = _measure(in_cpu, prompts, local=True)
    in_cpu.close()
    ssd_folder = engines.folder / "ssd"
    ssd_folder.mkdir(exist_ok=True)
    small = SSD_PROMPTS_IN_CPU * PROMPT * block_bytes(engines.dtype) / 2**30
    env = {"FLEXKV_CPU_CACHE_GB": f"{small:.4f}", "FLEXKV_SSD_CACHE_GB": "2", "FLEXKV_SSD_CACHE_DIR": str(ssd_folder)}
    on_ssd = engines.start(f"{kind}-ssd", kind, **env).ready()
    again, _, ssd = _measure(on_ssd, max(prompts, 2 * SSD_PROMPTS_IN_CPU + 1))
    _check_source(on_ssd, kind, len(ssd))
    on_ssd.close()
    restarted = engines.start(f"{kind}-restarted", kind, **env).ready()
    ask(restarted, 1 << 20, PROMPT)             # the first request of a process is slower, whatever it is
    warm = _hits(restarted, len(ssd))
    computed += again
    base = table.median(computed)
    name = CONNECTORS[kind]
    return [_row(f"{name}: computed", computed, base), _row("  the engine's own cache", own, base),
            _row("  cpu tier", cpu, base, 0.05), _row("  SSD tier", ssd, base, 0.10),
            _row("  SSD tier after a restart", warm, base, 0.10)]


def _row(name: str, values: list[float], base: float, bar: float | None = None) -> tuple[str, ...]:
    low, high = table.quartiles(values)
    ratio = table.median(values) / base
    return (name, str(len(values)), f"{table.median(values):.4f}", f"{low:.4f}..{high:.4f}", f"{ratio:.4f}",
            table.verdict(ratio, bar) if bar else "")


def _measure(engine: EngineChild, prompts: int, local: bool = False) -> tuple[list[float], list[float], list[float]]:
    """Prompts that are new; again from the engine's own cache; then all of them again, from FlexKV's."""
    ask(engine, 1 << 20, PROMPT)
    computed, own = [], []
    for seed in range(prompts):
        engine.do("reset", False)
        seconds, cached = ask(engine, seed, PROMPT)
        if cached:
            raise SystemExit(f"{cached} tokens of a new prompt were in caches")
        computed.append(seconds)
        if local:
            own.append(ask(engine, seed, PROMPT)[0])
    engine.do("reset", False)
    engine.do("settle", 1.0)                    # the last ones are on their way to the SSD
    return computed, own, _hits(engine, prompts)


def _hits(engine: EngineChild, prompts: int) -> list[float]:
    hits = []
    for seed in range(prompts):
        engine.do("reset", False)
        seconds, cached = ask(engine, seed, PROMPT)
        if cached < PROMPT - 64:
            raise SystemExit(f"only {cached} of {PROMPT} tokens were in FlexKV's tiers")
        hits.append(seconds)
    return hits


def _check_source(engine: EngineChild, kind: str, prompts: int) -> None:
    """The connector class that comes with vLLM hides where hits come from; with the same tiers and
    prompts it is the same place."""
    if kind != "ours":
        return
    found = engine.do("metrics", "metrics")["result"]
    if found.get("loads", 0) < prompts or not found.get("hit_ssd_tokens", 0):
        raise SystemExit(f"the hits were not from the SSD tier: {found}")


# ---- prompts that are all new --------------------------------------------------------------------

def all_new(dtype: str, prompts: int, tokens: int, answer: int) -> None:
    """All engines are up at once and take turns, so that each sees the machine as the others do."""
    names = ("none", "none again", "upstream", "ours")
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="fk-bench-") as folder, Engines(Path(folder), dtype) as engines:
        children = {name: engines.start(name.replace(" ", "-"), name.split()[0]) for name in names}
        for child in children.values():
            child.ready()
        for seed in range(-3, prompts):
            for turn in range(len(names)):
                name = names[(seed + turn) % len(names)]
                seconds, cached = ask(children[name], 1000 + seed, tokens, answer)
                if cached:
                    raise SystemExit(f"{cached} tokens of a new prompt were in caches")
                if seed >= 0:                   # the others warm the engines up
                    times[name].append(seconds)
    rows = []
    for name in names:
        low, high = table.quartiles(times[name])
        ratio = table.median(times[name]) / table.median(times["none"])
        a, b = table.ratio_interval(times[name], times["none"])
        rows.append((CONNECTORS[name.split()[0]] + (" (again)" if "again" in name else ""), str(prompts),
                     f"{table.median(times[name]):.4f}", f"{low:.4f}..{high:.4f}", f"{ratio:.4f}", f"{a:.3f}..{b:.3f}",
                     table.verdict(ratio, 1.01) if name in ("upstream", "ours") else ""))
    table.show(f"All prompts new: {tokens} tokens, {answer} tokens of answer, {dtype} (seconds per request)",
               ("", "n", "median", "quartiles", "ratio", "95 % of ratios", "bar"), rows,
               ("Engines that are up at once take turns. The second one without a connector shows the noise.",))
