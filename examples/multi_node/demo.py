#!/usr/bin/env python3
"""Nodes that read from each other: prompts that one of them has seen are sent to the others. Tokens are compared, and what was
reused is counted, beside one node that has seen everything itself.

Started by demo.sh (`make demo-cluster`).
"""
from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import BLOCK, Answer, Cluster, Node, Options, Trouble  # noqa: E402
from processes import ended_by_signals, marked  # noqa: E402

FIRST_WORD, VOCAB = 8, 2048
TOKENS = 16                     # of each answer


@dataclass
class Prompt:
    home: int                   # the node that sees it first
    tokens: list[int]
    salt: str = ""              # a tenant: its blocks are nobody else's

    def more(self) -> dict[str, str]:
        return {"cache_salt": self.salt} if self.salt else {}


@dataclass
class Seen:
    """What was said about all prompts, and what was reused when they came again."""
    first: list[Answer] = field(default_factory=list)
    again: list[list[Answer]] = field(default_factory=list)

    def ratio(self) -> float:
        answers = [a for group in self.again for a in group]
        return sum(a.cached for a in answers) / sum(a.prompt for a in answers)


def prompts(nodes: int, count: int, length: int, salts: list[str], seed: int = 2026) -> list[Prompt]:
    """Several that share a beginning, as conversations do; the parts are not multiples of a block."""
    words = random.Random(seed)

    def text(n: int) -> list[int]:
        return [words.randrange(FIRST_WORD, VOCAB) for _ in range(n)]

    system = text(length // 4 + 7)
    return [Prompt(i % nodes, system + text(length - length // 4 + 13 * i % BLOCK), salts[i % len(salts)])
            for i in range(count)]


def warm_up(cluster: Cluster) -> None:
    """An engine's first requests are slow; they are not what this is about."""
    words = random.Random(1)
    for node in cluster.all:
        node.complete([words.randrange(FIRST_WORD, VOCAB) for _ in range(300)], 4)


def play(cluster: Cluster, work: list[Prompt]) -> tuple[Seen, Seen]:
    """Each prompt at its home, then at all others; and in the same order at the node alone, if there is one."""
    together, alone = Seen(), Seen()
    for p in work:
        together.first.append(cluster.nodes[p.home].complete(p.tokens, TOKENS, **p.more()))
    cluster.settle()
    for p in work:
        others = [n for n in cluster.nodes if n.number != p.home]
        together.again.append([n.complete(p.tokens, TOKENS, **p.more()) for n in others])
    if cluster.alone:
        one: Node = cluster.alone
        alone.first = [one.complete(p.tokens, TOKENS, **p.more()) for p in work]
        alone.again = [[one.complete(p.tokens, TOKENS, **p.more()) for _ in cluster.nodes[1:]] for p in work]
    return together, alone


def differences(work: list[Prompt], *seen: Seen) -> list[str]:
    """Prompts that were not always answered by the same tokens."""
    wrong = []
    for i, p in enumerate(work):
        said = {tuple(a.tokens) for s in seen for a in ([s.first[i], *s.again[i]] if s.first else [])}
        if len(said) != 1:
            wrong.append(f"prompt {i} (first seen by node{p.home}): {len(said)} different answers")
    return wrong


def fetched(cluster: Cluster) -> tuple[int, int]:
    """Blocks and bytes that nodes had from others."""
    states = [(n.status() or {}).get("cluster", {}) for n in cluster.nodes]
    return sum(s["fetched_blocks"] for s in states), sum(s["fetched_bytes"] for s in states)


def seconds(answers: list[Answer]) -> str:
    times = [a.first_token for a in answers]
    return f"{statistics.median(times):.3f} s median ({min(times):.3f} to {max(times):.3f})"


def show(cluster: Cluster, args: argparse.Namespace) -> bool:
    work = prompts(args.nodes, args.prompts, args.length, [""])
    warm_up(cluster)
    print(f"{len(work)} prompts of about {args.length} tokens, each at one node first, then at the other "
          f"{args.nodes - 1}; engines' own prefix caches are emptied before each request\n", flush=True)
    together, alone = play(cluster, work)
    again = [a for group in together.again for a in group]
    blocks, size = fetched(cluster)
    wrong = differences(work, together, alone)
    for i, p in enumerate(work):
        print(f"prompt {i}: {len(p.tokens)} tokens, reused: at node{p.home} {together.first[i].cached}, then at the others "
              f"{' '.join(str(a.cached) for a in together.again[i])}")
    print(f"time to first token, cold           {seconds(together.first)}")
    print(f"time to first token, at the others  {seconds(again)}")
    print(f"reused by the others                {together.ratio():.4f} of the prompts' tokens; "
          f"{blocks} blocks, {size / 1e6:.0f} MB came from other nodes")
    good = not wrong and blocks > 0
    if cluster.alone:
        print(f"reused by one node with everything  {alone.ratio():.4f}")
        good = good and abs(alone.ratio() - together.ratio()) <= 0.01
    print(f"tokens: {'all equal' if not wrong else '; '.join(wrong)}")
    return good


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--nodes", type=int, default=2)
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--length", type=int, default=3000, help="tokens of a prompt")
    p.add_argument("--transport", default="", help="how nodes read from each other; see p2p_transport in flexkv.conf(5)")
    p.add_argument("--network", action="store_true", help="each node in a network namespace (root)")
    p.add_argument("--rate", default="1gbit", help="of each node's line, with --network; as tc has it")
    p.add_argument("--alone", action="store_true", help="and one node that sees everything, to compare with")
    p.add_argument("--logs", type=Path, help="copy the logs there")
    args = p.parse_args()
    if not 2 <= args.nodes <= 16:
        p.error("--nodes: 2 to 16")
    return args


def run(args: argparse.Namespace, folder: Path) -> bool:
    options = Options(nodes=args.nodes, transport=args.transport, network=args.network, rate=args.rate, alone=args.alone)
    where = f"in network namespaces, {args.rate} each" if args.network else "on 127.0.0.1"
    print(f"starting Redis and {args.nodes + args.alone} vLLM servers {where}; each engine takes half a minute of CPU", flush=True)
    began = time.monotonic()
    try:
        with Cluster(folder, options) as cluster:
            print(f"ready after {time.monotonic() - began:.0f} s\n", flush=True)
            good = show(cluster, args)
    finally:
        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.glob("*.log"):
                shutil.copy(log, args.logs)
    print(f"\nstopped; processes left: {len(marked(folder))}")
    return good


def main() -> int:
    args = arguments()
    folder = Path(tempfile.mkdtemp(prefix="flexkv-nodes."))     # short: sockets in it have at most 107 bytes
    try:
        with ended_by_signals():
            return 0 if run(args, folder) else 1
    except Trouble as e:
        print(f"multi-node demo: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
