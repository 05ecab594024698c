#!/usr/bin/env python3
"""How much a large matrix multiply is slowed while blocks are copied at full rate, and how fast they
are copied meanwhile. Run on a machine with a GPU, with torch and our package on the path.

    gemm.py [SECONDS [PAGE_KIB]]    prints one line for each direction, and JSON at the end
"""
import json
import os
import statistics
import sys
import threading
import time

import torch

from flexkv._flexkv import Agent, Config, Node

PAGE = int(sys.argv[2]) * 1024 if len(sys.argv) > 2 else 65536
LAYERS, PAGES, TOKENS = 2 * 1024 * 1024 // PAGE, 1024, 16
SIZE = 8192


def open_engine():
    config = Config()
    config.set("cpu_cache_gb", "3")
    node = Node.open(config)
    address = f"ipc://@flexkv-gemm-{os.getpid()}"
    node.listen(address)
    pages = [torch.randint(0, 255, (PAGES, PAGE), dtype=torch.uint8, device="cuda") for _ in range(LAYERS)]
    agent = Agent(address, [(p.data_ptr(), PAGE, PAGE, PAGES) for p in pages], instance="gemm")
    space = node.space("default", tokens_per_block=TOKENS, ranks=1, workers=1, instance="gemm",
                       wait_ms=30000)
    return node, agent, space, pages


def wait_for(node, op):
    while True:
        for done in node.poll(16, 10000):
            if done.op == op:
                assert done.status == 0, done
                return


class Copier(threading.Thread):
    """Loads, or stores, half of the pages again and again."""

    def __init__(self, node, space, load):
        super().__init__(daemon=True)
        self.node, self.names, self.load = node, space.namespace(), load
        self.stop, self.bytes = False, 0

    def keys(self, seed):
        return self.names.keys_from_tokens([seed * 1000000 + i for i in range(PAGES // 2 * TOKENS)])

    def run(self):
        pages, seed = list(range(PAGES // 2)), 1
        keys = self.keys(0)
        wait_for(self.node, self.names.put(keys, 0, pages))
        sets = [self.keys(s) for s in range(1, 5)]
        while not self.stop:
            if self.load:
                found = self.names.match(keys)
                wait_for(self.node, self.node.get(found.lease, 0, pages))
            else:
                if seed % len(sets) == 0:
                    self.node.reset()
                wait_for(self.node, self.names.put(sets[seed % len(sets)], 0, pages))
                seed += 1
            self.bytes += len(pages) * LAYERS * PAGE


def multiplies(seconds):
    """Median milliseconds of one."""
    a = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            torch.matmul(a, b)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 20)
    return statistics.median(times)


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    node, agent, space, pages = open_engine()
    multiplies(1)
    out = {}
    for load in (True, False):
        ratios, rates = [], []
        for _ in range(4):
            alone = multiplies(seconds / 2)
            copier = Copier(node, space, load)
            copier.start()
            time.sleep(0.3)
            before, start = copier.bytes, time.monotonic()
            busy = multiplies(seconds / 2)
            rates.append((copier.bytes - before) / (time.monotonic() - start) / 1e9)
            copier.stop = True
            copier.join()
            ratios.append(busy / alone)
        name = "load" if load else "store"
        out[name] = {"slowed": statistics.median(ratios) - 1, "GB/s": statistics.median(rates),
                     "runs": [round(r - 1, 4) for r in ratios]}
        print(f"{name}: multiply slowed by {100 * out[name]['slowed']:.1f} % at {out[name]['GB/s']:.1f} GB/s "
              f"({out[name]['runs']})")
    agent.close()
    node.close()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
