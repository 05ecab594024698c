#!/usr/bin/env python3
"""The conversation of `make demo`: the real vLLM without FlexKV, with it, and after a restart.

Called by tools/demo with the engine's python. Every conversation is played twice, token for
token, once by an engine without FlexKV; any difference between the answers fails the demo.
"""
import argparse
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from demo_server import DemoError, Server

ROOT = Path(__file__).resolve().parent.parent
USERS = 4
TURNS = 5               # the last one after the restart
SYSTEM_TOKENS = 1024    # the same for all users
DOCUMENT_TOKENS = 2048  # one for each user
QUESTION_TOKENS = 192
ANSWER_TOKENS = 32
FIRST_WORD, VOCAB = 8, 2048
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ending: list[int] = []
COUNTER = "vllm:flexkv_"
SOURCE = 'vllm:prompt_tokens_cached_by_source_total{'


@dataclass
class Phase:
    """Some turns, and what they cost and reused."""
    name: str
    turns: range
    prompts: list[int] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    cpu: int = 0            # tokens, as the engine counts them
    ssd: int = 0
    counters: dict[str, int] = field(default_factory=dict)      # FlexKV's own, at the end


def phases() -> list[Phase]:
    return [Phase("first turn", range(0, 1)), Phase(f"turns 2 to {TURNS - 1}", range(1, TURNS - 1)),
            Phase("after the restart", range(TURNS - 1, TURNS))]


class Conversations:
    """What the users say is fixed; what they were answered grows with the run."""

    def __init__(self) -> None:
        words = random.Random(2026)

        def text(length: int) -> list[int]:
            return [words.randrange(FIRST_WORD, VOCAB) for _ in range(length)]

        system = text(SYSTEM_TOKENS)
        self.contexts = [system + text(DOCUMENT_TOKENS) for _ in range(USERS)]
        self.questions = [[text(QUESTION_TOKENS) for _ in range(USERS)] for _ in range(TURNS)]
        self.answers: dict[tuple[int, int], list[int]] = {}

    def play_turn(self, server: Server, turn: int, phase: Phase) -> None:
        first_token = []
        for user in range(USERS):
            server.reset_prefix_cache()
            prompt = self.contexts[user] + self.questions[turn][user]
            answer, seconds = server.complete(prompt, ANSWER_TOKENS)
            self.contexts[user] = prompt + answer
            self.answers[user, turn] = answer
            phase.prompts.append(len(prompt))
            first_token.append(seconds)
        phase.first_token += first_token
        print(f"    turn {turn + 1}: {USERS} prompts of {phase.prompts[-1]:,} tokens, first token after "
              f"{' '.join(f'{s:.3f}' for s in first_token)} s", flush=True)


def play(server: Server, talk: Conversations, phase: Phase) -> None:
    before = server.metrics()
    for turn in phase.turns:
        talk.play_turn(server, turn, phase)
    after = server.metrics()
    phase.cpu += reused(after, "host") - reused(before, "host")
    phase.ssd += reused(after, "disk") - reused(before, "disk")
    for key, value in after.items():
        if key.startswith(COUNTER):
            phase.counters[key.removeprefix(COUNTER).split("{")[0].removesuffix("_total")] = int(value)


def reused(metrics: dict[str, float], source: str) -> int:
    return int(sum(v for k, v in metrics.items() if k.startswith(SOURCE) and f'source="{source}"' in k))


def warm_up(server: Server, seed: int) -> None:
    """The first request of an engine is slow; it is not what the demo is about."""
    words = random.Random(seed)
    server.complete([words.randrange(FIRST_WORD, VOCAB) for _ in range(512)], 4)


class Demo:
    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.out = args.work, args.out
        self.python = sys.executable
        self.model = args.work / "model"
        self.flexkv = {"PYTHONPATH": str(args.package), "FLEXKV_CPU_CACHE_GB": "1",
                       "FLEXKV_SSD_CACHE_GB": "2", "FLEXKV_SSD_CACHE_DIR": str(args.ssd)}

    @contextmanager
    def server(self, name: str, flexkv: bool) -> Iterator[Server]:
        print(f"  {name}: starting the engine ...", flush=True)
        start = time.monotonic()
        with Server(self.python, self.model, self.work, self.out / f"engine-{name}.log", flexkv,
                    self.flexkv if flexkv else {}) as server:
            print(f"    up after {time.monotonic() - start:.0f} s", flush=True)
            yield server

    def run(self) -> tuple[list[Phase], list[Phase], Conversations, Conversations]:
        subprocess.run([self.python, ROOT / "tests/engine/tiny_model.py", "demo", self.model],
                       check=True, timeout=120)
        plain, cached = phases(), phases()
        alone, together = Conversations(), Conversations()
        with self.server("without-flexkv", flexkv=False) as server:
            warm_up(server, 1)
            for phase in plain:
                play(server, alone, phase)
        with self.server("with-flexkv", flexkv=True) as server:
            warm_up(server, 2)
            for phase in cached[:-1]:
                play(server, together, phase)
        with self.server("restarted", flexkv=True) as server:
            warm_up(server, 3)
            play(server, together, cached[-1])
        return plain, cached, alone, together


def table(plain: list[Phase], cached: list[Phase]) -> str:
    lines = [f"{'':<20}{'prompt':>8}  {'time to first token, s':^26}  {'prompt tokens reused':^26}",
             f"{'':<20}{'tokens':>8}  {'without':>8}{'FlexKV':>9}{'ratio':>9}  "
             f"{'from CPU':>9}{'from SSD':>9}{'of all':>8}"]
    for was, now in zip(plain, cached):
        alone, together = statistics.median(was.first_token), statistics.median(now.first_token)
        share = (now.cpu + now.ssd) / sum(now.prompts)
        lines.append(f"{now.name:<20}{statistics.median(now.prompts):>8,.0f}  {alone:>8.3f}{together:>9.3f}"
                     f"{together / alone:>9.2f}  {now.cpu:>9,}{now.ssd:>9,}{share:>8.0%}")
    return "\n".join(lines)


def counters(cached: list[Phase]) -> str:
    """FlexKV's own counts at the end of both engines that ran with it."""
    first, second = cached[-2].counters, cached[-1].counters

    def both(name: str) -> int:
        return first.get(name, 0) + second.get(name, 0)

    return (f"{both('loads')} loads, {both('failed_loads')} failed; blocks of 32 tokens: {both('loaded_blocks'):,} loaded, "
            f"{both('stored_blocks'):,} stored or known, {second.get('ssd_used_blocks', 0):,} on SSD at the end")


def check(cached: list[Phase], alone: Conversations, together: Conversations) -> None:
    for (user, turn), want in alone.answers.items():
        got = together.answers[user, turn]
        if got != want:
            at = next(i for i, pair in enumerate(zip(want, got)) if pair[0] != pair[1])
            raise DemoError(f"WRONG TOKENS: user {user + 1}, turn {turn + 1}: token {at + 1} is {got[at]}, "
                            f"without FlexKV it was {want[at]}")
    if not cached[1].cpu:
        raise DemoError("nothing was reused from the CPU tier: FlexKV did not work (demo-out/engine-with-flexkv.log)")
    if not cached[2].ssd:
        raise DemoError("nothing was reused from the SSD tier after the restart (demo-out/engine-restarted.log)")


def end(number: int, _: object) -> None:
    """A signal ends the demo, and first its engine; no further signal may interrupt that."""
    if not ending:
        ending.append(number)
        sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", type=Path, required=True, help="folder with FlexKV's Python package")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for all but the SSD tier")
    parser.add_argument("--ssd", type=Path, required=True, help="an empty folder for the SSD tier")
    parser.add_argument("--out", type=Path, required=True, help="where the engine's logs go")
    args = parser.parse_args()
    for s in SIGNALS:
        signal.signal(s, end)
    start = time.monotonic()
    try:
        plain, cached, alone, together = Demo(args).run()
        print(f"\n{table(plain, cached)}\n\n{counters(cached)}", flush=True)
        check(cached, alone, together)
    except DemoError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    n = len(alone.answers)
    print(f"All {n} answers ({n * ANSWER_TOKENS} tokens) are equal, token by token. "
          f"{time.monotonic() - start:.0f} s; the engine's logs are in {args.out}/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
