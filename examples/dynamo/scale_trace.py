#!/usr/bin/env python3
"""Makes a trace that fits a small machine from one of traces/ (the form of Mooncake's):

    scale_trace.py TRACE.jsonl[.gz] OUT.jsonl [--every N] [--first N] [--shrink N] [--blocks N]
                   [--answer TOKENS] [--seconds S]

  --every 1     takes each n-th request (the reference's benchmark takes each sixth)
  --first 0     and of these so many; 0: all
  --shrink 16   a block of 512 tokens becomes one of 512 / 16: inputs and answers shrink with it
  --blocks 60   prompts are cut after so many blocks
  --answer 32   answers are cut after so many tokens
  --seconds 0   the requests are spread over so much time, as they were; 0: in the trace's own time

What is shared stays shared: hash_ids are kept but for those behind the cut, and a prompt's length
always fits the number of its ids, as load generators demand.
"""
import argparse
import gzip
import json
import math
import sys

BLOCK = 512


def read(path):
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def scaled(request, shrink, blocks, answer):
    block = BLOCK // shrink
    ids = request["hash_ids"][:blocks]
    length = math.ceil(request["input_length"] / shrink)
    # Within the last of its blocks, also where the trace itself was generous.
    length = max(min(length, len(ids) * block), (len(ids) - 1) * block + 1)
    output = max(1, min(math.ceil(request.get("output_length", 1) / shrink), answer))
    return {"timestamp": request["timestamp"], "input_length": length, "output_length": output,
            "hash_ids": ids}


def respread(requests, seconds):
    first = requests[0]["timestamp"]
    span = requests[-1]["timestamp"] - first
    factor = seconds * 1000 / span if seconds and span else 1
    for request in requests:
        request["timestamp"] = round((request["timestamp"] - first) * factor)


def hit_ratio(requests):
    """Blocks that an unlimited cache would have."""
    seen, hits, all_ids = set(), 0, 0
    for request in requests:
        hits += sum(i in seen for i in request["hash_ids"])
        all_ids += len(request["hash_ids"])
        seen.update(request["hash_ids"])
    return hits / all_ids


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("out")
    for name, default in (("every", 1), ("first", 0), ("shrink", 16), ("blocks", 60), ("answer", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=0)
    args = parser.parse_args()
    if args.every < 1 or args.blocks < 1 or args.answer < 1 or args.shrink not in (1, 2, 4, 8, 16, 32):
        parser.error("--every, --blocks and --answer are 1 or more, --shrink a power of two up to 32")
    requests = [scaled(r, args.shrink, args.blocks, args.answer)
                for n, r in enumerate(read(args.trace)) if n % args.every == 0 and r["hash_ids"]]
    requests = requests[:args.first or None]
    if not requests:
        parser.error("no request is left")
    respread(requests, args.seconds)
    with open(args.out, "w") as out:
        out.writelines(json.dumps(r) + "\n" for r in requests)
    tokens = sum(r["input_length"] for r in requests)
    print(f"{len(requests)} requests, {tokens} tokens, {tokens // len(requests)} on average, "
          f"{requests[-1]['timestamp'] / 1000:.0f} s, unlimited cache hits {hit_ratio(requests):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
