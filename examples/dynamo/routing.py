#!/usr/bin/env python3
"""Dynamo's KV router at the scale of the reference's deployment: four workers, the whole Mooncake
conversation trace, with FlexKV and without. Called by routing.sh.

Real are the front end and its router, the workers' runtime and relays of events, FlexKV's nodes with
their CPU tier and SSD, every lookup, load, store, eviction and event. Not there are engine and clock:
time is the trace's, and what takes time takes what MODEL_SPEED says. So hits and the router's choices are
measured, times are modelled, and an hour of traffic is played in minutes, also on a busy machine.

A worker is: one prefill at a time in order of arrival, each once its blocks have room on the GPU
(first what is loaded, then the rest of the prompt), any number of answers at once. Prompts
are sent to the front end as they are in the trace, 12,000 tokens on average; what is answered is not
stored.
"""
import argparse
import heapq
import http.client
import json
import math
import re
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path

from deployment import MODEL, Options, Trouble, ended_by_signals, marked
from routing_worker import MOST_BLOCKS, block_tokens
from scale_trace import BLOCK as TRACE_BLOCK
from scale_trace import read
from spoken import SECONDS, Spoken

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = "kv+flexkv,kv,round-robin+flexkv,round-robin"
CREDIT = (1, 0.75, 0.25)        # what Dynamo's router gives for a block on the GPU, in CPU memory, on SSD
ARRIVES, FIRST, ENDS = range(3)

# A 70B model (80 layers, 8 KV heads of 128, bf16) on two GPUs, and what stands beside it.
KV_BYTES = 2 * 80 * 8 * 128 * 2     # of a token: 320 KiB
MODEL_SPEED = {
    "prefill": 15000.0,             # tokens/s
    "cpu": 100e9 / KV_BYTES,        # two PCIe 5 x16: 50 GB/s each (docs/benchmarks.md has 54)
    "ssd": 12e9 / KV_BYTES,         # two NVMe: 6 GB/s each
    "answer": 50.0,                 # tokens/s of each request
}


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="routing.sh",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default=str(ROOT / "traces/conversation_trace.jsonl.gz"))
    parser.add_argument("--requests", type=int, default=0, help="only the first so many of them; 0: all")
    parser.add_argument("--every", type=int, default=1, help="each n-th request, in an n-th of the time")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gpu", type=int, default=600, help="blocks of 512 tokens on the GPUs of each worker")
    parser.add_argument("--cpu", type=int, default=1500, help="in its CPU tier")
    parser.add_argument("--ssd", type=int, default=12000, help="in its SSD tier")
    parser.add_argument("--block", type=int, default=TRACE_BLOCK,
                        help="tokens of a block in what is sent; a smaller one is quicker")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--seconds", type=float, default=3600, help="for one row")
    parser.add_argument("--json", type=Path, help="writes the figures there, too")
    args = parser.parse_args(given)
    if min(args.every, args.workers, args.gpu, args.cpu, args.ssd) < 1 or args.requests < 0:
        parser.error("sizes and counts are 1 or more")
    if not 2 <= args.block <= TRACE_BLOCK:
        parser.error(f"--block is 2 to {TRACE_BLOCK}: a block's number is in its first two tokens")
    for name in args.rows.split(","):
        router, _, store = name.partition("+")
        if router not in ("kv", "round-robin", "random") or store not in ("", "flexkv"):
            parser.error(f"--rows: {name}: kv, round-robin or random, with +flexkv or without")
    return args


# ---- the trace ------------------------------------------------------------------------------------

class Request:
    def __init__(self, line, speed, block):
        self.time = line["timestamp"] / 1000 / speed
        self.whole = line["input_length"] // TRACE_BLOCK
        self.tokens = line["input_length"]
        self.answer = line.get("output_length", 1)
        self.more = math.ceil((self.tokens + self.answer) / TRACE_BLOCK) - self.whole
        rest = self.tokens % TRACE_BLOCK
        ids = line["hash_ids"]
        if len(ids) * TRACE_BLOCK < self.tokens or not 0 <= min(ids) <= max(ids) < MOST_BLOCKS:
            raise ValueError(f"hash_ids of the request at {line['timestamp']} ms do not fit")
        self.block, self.ids = block, ids[:self.whole]
        # Never a whole block: that would be another prompt's.
        self.end = block_tokens(ids[-1], block)[:max(1, rest * block // TRACE_BLOCK)] if rest else []
        self.found = {}         # tokens by tier
        self.told = 0           # tokens that FlexKV had announced when the prefill began
        self.due = 0.0          # blocks: the router's credit by what was announced when it was asked
        self.credit = 0.0       # and what it gave
        self.ttft = 0.0
        self.worker = self.number = self.connection = self.reply = None

    def prompt(self):
        """Made when it is needed: all of them are a gigabyte."""
        return [t for i in self.ids for t in block_tokens(i, self.block)] + self.end


def requests_of(args):
    try:
        lines = list(read(args.trace))[::args.every][:args.requests or None]
        requests = [Request(line, args.every, args.block) for line in lines if line["input_length"] > 0]
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as e:
        raise Trouble(f"{args.trace}: no trace that can be played: {type(e).__name__}: {e}") from None
    if not requests:
        raise Trouble(f"{args.trace}: no request is left")
    room = max(r.whole + r.more for r in requests)
    if room > args.gpu:
        raise Trouble(f"--gpu {args.gpu}: the longest request alone needs {room} blocks")
    return requests


# ---- the deployment -------------------------------------------------------------------------------

class Routing(Spoken):
    """Conversations with its workers are one question at a time."""

    PROGRAM = HERE / "routing_worker.py"

    def __init__(self, folder, options, args):
        super().__init__(folder, options)
        self.args = args
        self.idle = []          # connections to the front end

    def environment(self, extra):
        """A line of log for each request would be half of the work."""
        return super().environment(extra) | {"DYN_LOG": "warn"}

    def settings(self, number):
        args = self.args
        return super().settings(number) | {
            "gpu": args.gpu, "cpu": args.cpu, "ssd": args.ssd, "block": args.block,
            "ssd_dir": str(self.ssd_folder(number)), "flexkv": self.options.flexkv, "context": 1 << 20}

    def hear(self, number):
        return self._hear([number])[1]

    def _hear(self, numbers, what="", also=()):
        """The next line of one of these workers: (which, what)."""
        pipes = {self.workers[n].process.stdout.fileno(): n for n in numbers}
        ready = select.select([*pipes, *also], [], [], SECONDS)[0]
        number = next((pipes[fd] for fd in ready if fd in pipes), None)
        if number is None:
            if ready:
                return None, None
            raise Trouble(f"nothing came in {SECONDS} s {what}\n{self.workers[numbers[0]].tail()}\n"
                          f"{self.frontend.tail()}")
        line = self.workers[number].process.stdout.readline()
        if not line:
            raise Trouble(f"worker{number} has ended {what}\n{self.workers[number].tail()}")
        return number, json.loads(line)

    def tell(self, number, *command):
        try:
            self.workers[number].process.stdin.write(json.dumps(command).encode() + b"\n")
            self.workers[number].process.stdin.flush()
        except BrokenPipeError:
            raise Trouble(f"worker{number} has ended\n{self.workers[number].tail()}") from None

    def question(self, number, *command):
        self.tell(number, *command)
        return self._hear([number], f"after {command[0]}")[1]

    def send(self, r):
        """To the front end; returns once a worker has it."""
        r.connection = self.idle.pop() if self.idle else http.client.HTTPConnection(
            "127.0.0.1", self.http, timeout=SECONDS)
        r.connection.request("POST", "/v1/completions", json.dumps({
            "model": MODEL, "prompt": r.prompt(), "max_tokens": 2, "ignore_eos": True, "stream": True,
            "nvext": {"extra_fields": ["worker_id", "timing"]}}), {"Content-Type": "application/json"})
        everybody = range(self.options.workers)
        r.worker, said = self._hear(everybody, "of a request that was sent", [r.connection.sock])
        if said is None:        # the front end speaks first: a refusal, or just the header
            self._header(r)
            r.worker, said = self._hear(everybody, "of a request that was sent")
        r.number = said["arrived"]
        r.due = sum(n * weight for n, weight in zip(said["told"], CREDIT))
        if said["blocks"] != r.whole:
            raise Trouble(f"{r.whole} whole blocks were sent, worker{r.worker} got {said['blocks']}")

    def _header(self, r):
        r.reply = r.connection.getresponse()
        if r.reply.status != 200:
            raise Trouble(f"the front end: status {r.reply.status}: {r.reply.read(300)!r}\n"
                          f"{self.frontend.tail()}")

    def first_token(self, r):
        self.tell(r.worker, "first", r.number)
        if r.reply is None:
            self._header(r)
        if not r.reply.readline().startswith(b"data:"):
            raise Trouble(f"no first token\n{self.workers[r.worker].tail()}\n{self.frontend.tail()}")

    def end(self, r):
        self.tell(r.worker, "end", r.number)
        text = r.reply.read()
        if b"[DONE]" not in text:
            raise Trouble(f"an answer was cut: {text[-300:]!r}\n{self.workers[r.worker].tail()}")
        if credit := re.search(rb'"kv_hit_rate":([0-9.e-]+)', text):
            r.credit = float(credit[1]) * math.ceil(r.tokens / TRACE_BLOCK)
        self.idle.append(r.connection)
        r.connection = r.reply = None


# ---- the clock ------------------------------------------------------------------------------------

class Play:
    """Plays the requests; all times but `deadline` are the trace's."""

    def __init__(self, d, requests, seconds):
        self.d = d
        self.deadline = time.monotonic() + seconds
        self.waiting = [[] for _ in d.workers]
        self.busy = [False] * len(d.workers)
        self.running = [0] * len(d.workers)
        self.events = [(r.time, n, ARRIVES, r) for n, r in enumerate(requests)]
        self.count = len(requests)
        heapq.heapify(self.events)

    def at(self, when, what, r):
        self.count += 1         # of two at the same time the one that was known first
        heapq.heappush(self.events, (when, self.count, what, r))

    def run(self):
        while self.events:
            now, _, what, r = heapq.heappop(self.events)
            if time.monotonic() > self.deadline:
                raise Trouble("the time for a row is over: --seconds, --requests")
            try:
                (self.arrives, self.has_first, self.ends)[what](now, r)
            except (OSError, http.client.HTTPException) as e:
                raise Trouble(f"the front end does not answer: {e!r}\n{self.d.frontend.tail()}") from None

    def arrives(self, now, r):
        self.d.send(r)
        self.waiting[r.worker].append(r)
        self.begin(now, r.worker)

    def begin(self, now, worker):
        if self.busy[worker] or not self.waiting[worker]:
            return
        r = self.waiting[worker][0]
        found = self.d.question(worker, "start", r.number, r.more)
        if not found["room"]:
            if not self.running[worker]:
                raise Trouble(f"worker{worker} has no room and no request that will give some")
            return
        self.waiting[worker].pop(0)
        self.busy[worker] = True
        self.running[worker] += 1
        r.found = {tier: found[tier] * TRACE_BLOCK for tier in ("gpu", "cpu", "ssd")}
        r.told = sum(found["told"][1:]) * TRACE_BLOCK
        r.found["new"] = r.tokens - sum(r.found.values())
        took = (r.found["cpu"] / MODEL_SPEED["cpu"] + r.found["ssd"] / MODEL_SPEED["ssd"]
                + r.found["new"] / MODEL_SPEED["prefill"])
        self.at(now + took, FIRST, r)

    def has_first(self, now, r):
        self.d.first_token(r)
        r.ttft = now - r.time
        self.busy[r.worker] = False
        self.at(now + r.answer / MODEL_SPEED["answer"], ENDS, r)
        self.begin(now, r.worker)

    def ends(self, now, r):
        worker = r.worker
        self.d.end(r)
        self.running[worker] -= 1
        self.begin(now, worker)


# ---- figures --------------------------------------------------------------------------------------

def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(name, requests, workers, wall):
    tokens = {tier: sum(r.found[tier] for r in requests) for tier in ("gpu", "cpu", "ssd", "new")}
    ttft = [r.ttft for r in requests]
    return {"row": name, "requests": len(requests), "prompt_tokens": sum(r.tokens for r in requests),
            "tokens": tokens, "ttft_mean": sum(ttft) / len(ttft), "ttft_p50": quantile(ttft, 0.5),
            "ttft_p99": quantile(ttft, 0.99), "wall_s": wall,
            "per_worker": [sum(r.worker == n for r in requests) for n in range(workers)],
            "computed_per_worker": [sum(r.found["new"] for r in requests if r.worker == n)
                                    for n in range(workers)],
            "announced": sum(r.told for r in requests),
            "credit_as_announced": sum(abs(r.credit - r.due) < 0.01 for r in requests)}


HEAD = (f"{'':20} {'GPU':>6} {'CPU':>6} {'SSD':>6} {'reused':>7}   {'TTFT s mean':>11} {'p50':>6} {'p99':>6}   "
        "requests of each worker")


def show(f):
    share = {tier: n / f["prompt_tokens"] for tier, n in f["tokens"].items()}
    print(f"{f['row']:20} {share['gpu']:6.1%} {share['cpu']:6.1%} {share['ssd']:6.1%} {1 - share['new']:7.1%}   "
          f"{f['ttft_mean']:11.2f} {f['ttft_p50']:6.2f} {f['ttft_p99']:6.2f}   "
          f"{' '.join(map(str, f['per_worker']))}   ({f['wall_s']:.0f} s)", flush=True)
    said = []
    if f["row"].startswith("kv"):
        said.append("the router's credit was what had been announced for "
                    f"{f['credit_as_announced']} of {f['requests']}")
    if f["row"].endswith("+flexkv"):
        said.append(f"announced in FlexKV when prefills began {f['announced']} tokens, loaded "
                    f"{f['tokens']['cpu'] + f['tokens']['ssd']}; blocks not stored {f['dropped']}")
    if said:
        print("    " + "; ".join(said), flush=True)


def row(name, args, folder):
    router, _, with_flexkv = name.partition("+")
    requests = requests_of(args)
    folder.mkdir()
    options = Options(form="file", workers=args.workers, router=router, flexkv=bool(with_flexkv))
    with Routing(folder, options, args) as d:
        start = time.monotonic()
        Play(d, requests, args.seconds).run()
        wall = time.monotonic() - start
        dropped = sum(d.question(n, "dropped")["dropped"] for n in range(args.workers))
    shutil.rmtree(folder, ignore_errors=True)
    return figures(name, requests, args.workers, wall) | {"dropped": dropped}


def main():
    args = arguments()
    work = Path(tempfile.mkdtemp(prefix="flexkv-dynamo."))
    rows = []
    try:
        with ended_by_signals():
            for n, name in enumerate(args.rows.split(",")):
                rows.append(row(name, args, work / str(n)))
                if n == 0:
                    print(f"{Path(args.trace).name}: {rows[0]['requests']} requests, "
                          f"{rows[0]['prompt_tokens']} tokens, {args.workers} workers\n{HEAD}")
                show(rows[-1])
    except Trouble as e:
        print(f"routing: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if left := marked(work):
        print(f"routing: processes are left: {sorted(left)}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
