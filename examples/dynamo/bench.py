#!/usr/bin/env python3
"""Dynamo's router with and without knowledge of KV, workers with and without FlexKV: the same traffic,
from a Mooncake trace, through aiperf. Called by bench.sh, which says what can be given.

What is measured is this machine's engine: a small model on CPUs. The table is for comparing its own
rows, and for being made again where there are GPUs.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deployment import MODEL, Deployment, Options, Trouble, ended_by_signals

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 900                   # for one run of aiperf
TIERS = {"vllm:prefix_cache_hits_total": "engine", "vllm:flexkv_hit_cpu_tokens_total": "FlexKV cpu",
         "vllm:flexkv_hit_ssd_tokens_total": "FlexKV ssd"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, prog="bench.sh",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--trace", default=str(ROOT / "traces/agentic_trace.jsonl.gz"))
    parser.add_argument("--scale", default="--every 6 --first 100 --blocks 40 --answer 16 --seconds 90",
                        help="options of scale_trace.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--form", choices=("etcd", "file"), default="file")
    parser.add_argument("--engine-blocks", type=int, default=160, help="of 32 tokens, in each engine")
    parser.add_argument("--cpu", default="48M", help="FLEXKV_CPU_CACHE_GB of each worker")
    parser.add_argument("--ssd", default="512M", help="FLEXKV_SSD_CACHE_GB of each worker")
    parser.add_argument("--rows", default="kv+flexkv,kv,round-robin+flexkv,round-robin")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out")
    return parser.parse_args()


def hub_tokenizer(model, home):
    """As a hub's cache has it: aiperf's processes take no other path when offline. Its name there."""
    folder = home / "hub" / f"models--local--{MODEL}"
    revision = "0" * 40
    place = folder / "snapshots" / revision
    place.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, place)
    return f"local/{MODEL}"


def load(d, args, trace, out):
    home = d.folder / "hub-home"
    tokenizer = hub_tokenizer(d.model, home)
    command = [args.aiperf, "-m", "aiperf", "profile", "--model", MODEL, "--tokenizer", tokenizer,
               "--endpoint-type", "chat", "--endpoint", "/v1/chat/completions", "--streaming",
               "--url", f"http://localhost:{d.http}", "--input-file", str(trace),
               # Without these two it sends ten requests, in no order of time.
               "--custom-dataset-type", "mooncake_trace", "--fixed-schedule",
               "--isl-block-size", "32", "--random-seed", "100", "--extra-inputs", "ignore_eos:true",
               "--ui", "none", "--artifact-dir", str(out),
               "-H", "Authorization: Bearer NOT USED", "-H", "Accept: text/event-stream"]
    child = d.spawn("aiperf", command, {"HF_HOME": str(home)})
    try:
        status = child.process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise Trouble(f"aiperf did not end in {SECONDS} s\n{child.tail()}") from None
    if status:
        raise Trouble(f"aiperf ended with status {status}\n{child.tail()}")
    d.children.remove(child)
    return json.loads((out / "profile_export_aiperf.json").read_text())


def cached(d):
    """The engines' counters, of all workers together: prompt tokens, and those that were reused."""
    found = {}
    for port in d.system:
        _, body = d.ask("GET", "/metrics", port=port)
        for name, value in re.findall(r"^(vllm:\w+)\{.*\} ([0-9.e+]+)$", body.decode(), re.M):
            found[name] = found.get(name, 0) + float(value)
    return found


def row(name, args, folder, trace):
    router, _, flexkv = name.partition("+")
    options = Options(form=args.form, workers=args.workers, router=router, flexkv=bool(flexkv),
                      own_connectors=range(args.workers), engine_blocks=args.engine_blocks,
                      max_length=2048, cpu_cache=args.cpu, ssd_cache=args.ssd)
    folder.mkdir()
    with Deployment(folder, options) as d:
        for number in range(args.workers):      # the first request of an engine is a slow one
            d.complete([7] * 40, 2, d.instance(number))
        before = cached(d)
        result = load(d, args, trace, args.out / name)
        after = cached(d)
    shutil.rmtree(folder, ignore_errors=True)
    return result, {key: value - before.get(key, 0) for key, value in after.items()}


def number(result, metric, field="avg"):
    return (result.get(metric) or {}).get(field) or 0


def show(name, result, tokens):
    asked = tokens.get("vllm:prompt_tokens_total") or 1
    hits = "  ".join(f"{what} {tokens[key] / asked:6.1%}" for key, what in TIERS.items()
                     if tokens.get(key))
    print(f"{name:20} {number(result, 'request_count'):8.0f} {number(result, 'time_to_first_token'):9.0f} "
          f"{number(result, 'time_to_first_token', 'p50'):8.0f} {number(result, 'time_to_first_token', 'p99'):8.0f} "
          f"{number(result, 'inter_token_latency'):8.1f} {number(result, 'output_token_throughput'):9.1f}   {hits}",
          flush=True)


def main():
    args = arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    trace = args.out / "trace.jsonl"
    said = subprocess.run([sys.executable, HERE / "scale_trace.py", args.trace, trace, *args.scale.split()],
                          capture_output=True, text=True)
    if said.returncode:
        print(said.stderr, file=sys.stderr)
        return 2
    print(f"{Path(args.trace).name} {args.scale}: {said.stdout}")
    print(f"{'':20} {'requests':>8} {'TTFT avg':>9} {'p50 ms':>8} {'p99':>8} {'TPOT ms':>8} {'tokens/s':>9}   "
          "prompt tokens from")
    work = Path(tempfile.mkdtemp(prefix="flexkv-dynamo."))
    try:
        with ended_by_signals():
            for n, name in enumerate(args.rows.split(",")):
                show(name, *row(name, args, work / str(n), trace))
    except Trouble as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
