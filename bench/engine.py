#!/usr/bin/env python3
"""What FlexKV costs and brings inside the real vLLM, on a CPU with a tiny model, each figure beside its limit or a
peer from the same run.

    python bench/engine.py [ttft|new|cost|memory]...       all of them without arguments; see docs/benchmarks.md

  ttft     time to first token of a 4k-token prompt: computed, and from each tier
  new      prompts that are all new: time per request against an engine without a connector
  cost     what a request of 8k tokens costs the scheduler's thread: raw module, connector classes, KVManager, in
           this process and with a daemon; vLLM's own CPU offloading manager beside them
  memory   what an idle engine's processes hold for FlexKV beyond the pool

Needs the environment of tools/engine-env with FlexKV's package in PYTHONPATH: make bench-engine. Figures mean
something on a machine that does nothing else.
"""
import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "engine")]

BUSY = 1.5              # load average from which a warning is printed
PARTS = ("cost", "memory", "ttft", "new")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], metavar="|".join(PARTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=12, help="of each kind, for ttft (12)")
    parser.add_argument("--rounds", type=int, default=300, help="for cost (300)")
    parser.add_argument("--requests", type=int, default=60, help="to each engine, for new (60)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a new prompt (2048)")
    parser.add_argument("--answer", type=int, default=8, help="tokens generated for a new prompt (8)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    parts = args.part or PARTS
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}" + (
        f": the machine is busy, the figures are noise (wanted: less than {BUSY})" if load > BUSY else ""))
    if "cost" in parts:
        import engine_cost
        engine_cost.run(args.rounds)
    if "memory" in parts:
        import engine_memory
        engine_memory.run(args.dtype)
    if "ttft" in parts or "new" in parts:
        import engine_time
        if "ttft" in parts:
            engine_time.first_token(args.dtype, args.prompts)
        if "new" in parts:
            engine_time.all_new(args.dtype, args.requests, args.tokens, args.answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
