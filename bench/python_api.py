#!/usr/bin/env python3
"""What a request costs the scheduler through the Python API, in microseconds.

    python bench/python_api.py                            a node in this process
    python bench/python_api.py --address ipc://@flexkv    the node of a running `flexkv serve`

For one prompt of --tokens tokens, all of it known (match, get) or all of it new (put):
  keys     keys_from_hashes: from the engine's 32-byte block hashes
  match    Namespace.match
  get      Node.get: from the call until it returns; the copy itself runs elsewhere
  put      Namespace.put: likewise
  named    the same with --events: the put names its blocks for KV events (lists of the engine's
           32-byte hashes and of token ids)
  take     with --events: Events.take of that prompt's blocks
  poll     Node.poll with nothing to take
Blocks are small, so that copies don't take part. Each figure: median and 99th percentile.
"""
import argparse
import ctypes
import json
import random
import statistics
import time

import flexkv

PAGE_BYTES = 256


def microseconds(call, samples):
    start = time.perf_counter_ns()
    result = call()
    samples.append((time.perf_counter_ns() - start) / 1000)
    return result


class Rig:
    """A node, one worker's pages (in this process in either mode), one namespace."""

    def __init__(self, address, tokens_per_block, n_blocks, rounds, events):
        self.n_blocks, self.tokens_per_block = n_blocks, tokens_per_block
        pages = 2 * n_blocks
        self.memory = ctypes.create_string_buffer(pages * PAGE_BYTES)
        regions = [(ctypes.addressof(self.memory), PAGE_BYTES, PAGE_BYTES, pages)]
        geometry = {"fingerprint": b"python_api", "tokens_per_block": tokens_per_block,
                    "slice_bytes": PAGE_BYTES}
        name = f"python_api-{tokens_per_block}"
        if address:
            self.node = flexkv.Node.connect(address)
        else:
            config = flexkv.Config()
            config.set("cpu_cache_blocks", str((2 * (rounds + 31) if events else rounds + 2) * n_blocks))
            config.set("enable_kv_events", str(int(events)))
            config.set("log_level", "WARNING")
            self.node = flexkv.Node.open(config)
        self.space = self.node.space(name, **geometry)
        self.space.register(0, regions)
        self.namespace = self.space.namespace("bench")
        self.events = self.node.events(self.space) if events else None

    def finish(self, op):
        """Waits for the operation, so that the next one is measured alone."""
        done = self.node.poll(timeout_ms=10000)
        if [c.op for c in done] != [op] or done[0].status:
            raise SystemExit(f"operation {op} ended as {done}")


def measure(rig, rounds, rng):
    names = ("keys", "match", "get", "put", "poll", *(("named", "take") if rig.events else ()))
    samples = {name: [] for name in names}
    node, namespace = rig.node, rig.namespace
    put_pages = list(range(rig.n_blocks))
    get_pages = list(range(rig.n_blocks, 2 * rig.n_blocks))
    for _ in range(rounds):
        hashes = [rng.randbytes(32) for _ in range(rig.n_blocks)]
        keys = microseconds(lambda: namespace.keys_from_hashes(hashes), samples["keys"])
        rig.finish(microseconds(lambda: namespace.put(keys, 0, put_pages), samples["put"]))
        found = microseconds(lambda: namespace.match(keys), samples["match"])
        if found.blocks != rig.n_blocks:
            raise SystemExit(f"{found.blocks} of {rig.n_blocks} blocks are known: the cpu tier is too small")
        rig.finish(microseconds(lambda: node.get(found.lease, 0, get_pages), samples["get"]))
        microseconds(node.poll, samples["poll"])
        if rig.events:
            measure_events(rig, samples, rng)
    return samples


def measure_events(rig, samples, rng):
    hashes = [rng.randbytes(32) for _ in range(rig.n_blocks)]
    tokens = [rng.randrange(100000) for _ in range(rig.n_blocks * rig.tokens_per_block)]
    keys = rig.namespace.keys_from_hashes(hashes)
    pages = list(range(rig.n_blocks))
    rig.finish(microseconds(lambda: rig.namespace.put(keys, 0, pages, 0, hashes, tokens), samples["named"]))
    events = microseconds(rig.events.take, samples["take"])
    if sum(len(e[2]) for e in events) != rig.n_blocks:
        raise SystemExit("not every block was announced")


def summary(samples):
    return {name: {"median_us": round(statistics.median(v), 2),
                   "p99_us": round(sorted(v)[int(len(v) * 0.99)], 2)} for name, v in samples.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="of a daemon; without it a node is opened in this process")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block", type=int, action="append", help="tokens per block (16 and 32)")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--events", action="store_true", help="with KV events; a daemon must have them on")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    rng = random.Random(1)
    results = {}
    for tokens_per_block in args.block or (16, 32):
        rig = Rig(args.address, tokens_per_block, args.tokens // tokens_per_block, args.rounds,
                  args.events)
        try:
            measure(rig, min(30, args.rounds), rng)         # caches and branch predictors
            results[tokens_per_block] = summary(measure(rig, args.rounds, rng))
        finally:
            rig.node.close()
    if args.json:
        print(json.dumps({"tokens": args.tokens, "address": args.address, "blocks": results}))
        return
    print(f"{args.tokens} tokens, {'daemon at ' + args.address if args.address else 'node in this process'}; "
          "microseconds: median (99th percentile)")
    names = list(next(iter(results.values())))
    print("tokens per block" + "".join(f"{name:>18}" for name in names) + f"{'match + get':>14}")
    for tokens_per_block, r in results.items():
        cells = "".join(f"{r[n]['median_us']:>9.2f} ({r[n]['p99_us']:>6.2f})" for n in names)
        launch = r["match"]["median_us"] + r["get"]["median_us"]
        print(f"{tokens_per_block:>16}{cells}{launch:>14.2f}")


if __name__ == "__main__":
    main()
