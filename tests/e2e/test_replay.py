"""`flexkv replay` as its users see it: hit counts against an independent model, bytes under faults, restarts,
kill -9, and what it says about wrong input.

The program is FLEXKV_BIN (default build/flexkv); FLEXKV_KILLS sets how often the kill -9 test kills (default 5).
"""
import gzip
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

import cache_model

ROOT = Path(__file__).resolve().parents[2]
BIN = os.environ.get("FLEXKV_BIN", str(ROOT / "build" / "flexkv"))
TRACES = {name: ROOT / "traces" / f"{name}_trace.jsonl.gz" for name in ("conversation", "synthetic", "agentic")}
CEILING = {"conversation": 0.3664, "synthetic": 0.6396, "agentic": 0.9676}
JSON_KEYS = {
    "requests", "blocks", "hit_blocks", "hit_ratio", "ceiling_ratio", "verified_blocks", "wrong_blocks",
    "failed_blocks", "evicted_blocks", "seconds", "cpu_seconds", "requests_per_cpu_second", "match_us", "get_us",
    "put_us", "bytes",
}


def run(*args, timeout=300):
    return subprocess.run([BIN, "replay", *map(str, args)], capture_output=True, text=True, timeout=timeout)


def replay(*args, status=0):
    done = run("--json", *args)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def requests():
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = cache_model.load_trace(TRACES[name])
        return loaded[name]

    return get


def write_trace(path, *requests):
    path.write_text("".join(
        json.dumps({"timestamp": t, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}) + "\n"
        for t, ids in requests))
    return path


# ---- hits ----

@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("percent", [0.1, 1, 5, 10, 20])
@pytest.mark.parametrize("name", TRACES)
def test_hits_equal_the_model(requests, name, percent, policy):
    trace = requests(name)
    slots = max(1, int(cache_model.unique_ids(trace) * percent / 100))
    hits, blocks, evicted = cache_model.simulate(trace, slots, policy)
    got = replay("--hit-only", "--policy", policy, "--cpu", slots, TRACES[name])
    assert (got["hit_blocks"]["cpu"], got["blocks"], got["evicted_blocks"]) == (hits, blocks, evicted)
    assert got["hit_blocks"]["ssd"] == 0


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("parts", [4, 32])
def test_hits_equal_the_model_in_small_blocks(requests, parts, policy):
    trace = requests("synthetic")[:1500]
    slots = cache_model.unique_ids(trace) * parts // 7
    hits, blocks, evicted = cache_model.simulate(trace, slots, policy, parts)
    got = replay("--hit-only", "--policy", policy, "--cpu", slots, "--tokens-per-block", 512 // parts, "--limit", 1500,
                 TRACES["synthetic"])
    assert (got["hit_blocks"]["cpu"], got["blocks"], got["evicted_blocks"]) == (hits, blocks, evicted)


@pytest.mark.parametrize("name", TRACES)
def test_unlimited_cache_reaches_the_ceiling(name):
    got = replay("--hit-only", "--cpu", "100%", TRACES[name])
    assert got["hit_ratio"] == got["ceiling_ratio"] == pytest.approx(CEILING[name], abs=6e-5)
    assert got["evicted_blocks"] == 0
    assert set(got) == JSON_KEYS


def test_a_request_larger_than_the_cache_is_kept_in_part(tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", (0, list(range(100))), (1, list(range(100))), (2, list(range(40))))
    got = replay("--hit-only", "--cpu", 30, trace)
    assert got["hit_blocks"]["cpu"] == 30 + 30


def test_policies_stay_below_belady():
    args = ["--hit-only", "--cpu", "5%", TRACES["agentic"]]
    bound = replay("--policy", "belady", *args)["hit_ratio"]
    assert bound == pytest.approx(0.8200, abs=5e-4)
    for policy in "lru lfu slru fifo mru filo s3fifo arc auto".split():
        ratio = replay("--policy", policy, *args)["hit_ratio"]
        assert 0 < ratio <= bound, policy


def test_belady_on_a_trace_small_enough_to_think_through(tmp_path):
    # Two blocks of room. At request 3 (c) nothing is worth leaving for it: bypassed.
    trace = write_trace(tmp_path / "t.jsonl", (0, [1]), (1, [2]), (2, [3]), (3, [1]), (4, [2]), (5, [3]))
    assert replay("--policy", "belady", "--cpu", 2, trace)["hit_blocks"]["cpu"] == 2
    assert replay("--hit-only", "--cpu", 2, trace)["hit_blocks"]["cpu"] == 0


# ---- bytes ----

def tiers(tmp_path, cpu="5%", ssd="20%"):
    return ["--cpu", cpu, "--ssd", ssd, "--ssd-dir", tmp_path, "--block-bytes", "16K", "--verify"]


@pytest.mark.parametrize("name,limit", [("conversation", 3000), ("synthetic", 1500), ("agentic", 700)])
@pytest.mark.parametrize("queue", [1, 6])
def test_every_byte_is_right(tmp_path, name, limit, queue):
    got = replay(*tiers(tmp_path), "--limit", limit, "--queue", queue, TRACES[name])
    assert (got["requests"], got["wrong_blocks"], got["failed_blocks"]) == (limit, 0, 0)
    assert got["verified_blocks"] == got["hit_blocks"]["cpu"] + got["hit_blocks"]["ssd"] > 0
    assert got["hit_blocks"]["ssd"] > 0
    assert got["bytes"]["ssd_write"] > 0 < got["bytes"]["ssd_read"]
    assert set(got) == JSON_KEYS


def test_bytes_hit_as_the_index_alone_does(tmp_path):
    args = ["--cpu", "5%", "--ssd", "20%", "--limit", 600, TRACES["synthetic"]]
    with_bytes = replay("--ssd-dir", tmp_path, "--backlog", 0, *args)
    alone = replay("--hit-only", *args)
    for key in ("hit_blocks", "evicted_blocks", "blocks"):
        assert with_bytes[key] == alone[key]


@pytest.mark.parametrize("policy", ["through", "on_reuse", "on_evict"])
def test_write_policies(tmp_path, policy):
    got = replay(*tiers(tmp_path), "--write-policy", policy, "--limit", 1500, TRACES["synthetic"])
    assert (got["wrong_blocks"], got["failed_blocks"]) == (0, 0)


FAULTS = ("read_error read_short read_flip read_misdirect write_error write_short write_torn write_lost "
          "write_misdirect enospc delay").split()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_never_give_wrong_bytes(tmp_path, fault):
    got = replay(*tiers(tmp_path), "--fault", f"{fault}=0.005,seed=7", "--limit", 2500, TRACES["conversation"])
    assert got["wrong_blocks"] == 0
    assert got["verified_blocks"] > 0
    if fault in ("read_error", "read_flip", "read_misdirect"):
        assert got["failed_blocks"] > 0


def test_warm_restart(tmp_path):
    args = [*tiers(tmp_path, "2%", "60%"), "--limit", 2000, TRACES["conversation"]]
    whole = replay(*args)
    restarted = replay("--warm-restart-at", 1000, *args)
    assert (restarted["wrong_blocks"], restarted["failed_blocks"]) == (0, 0)
    hits = [sum(r["hit_blocks"].values()) for r in (whole, restarted)]
    assert hits[1] >= hits[0] * 0.97


def test_second_run_is_warm_only_when_asked(tmp_path):
    args = [*tiers(tmp_path, "500blocks", "20000blocks"), "--backlog", 0, "--limit", 400, TRACES["conversation"]]
    cold = replay(*args)
    assert replay(*args)["hit_blocks"] == cold["hit_blocks"]
    warm = replay("--warm", *args)
    assert warm["wrong_blocks"] == 0
    assert warm["hit_ratio"] > 0.95 > cold["hit_ratio"]


def test_kill_and_go_on(tmp_path):
    rng = random.Random(os.environ.get("FLEXKV_SEED", time.time_ns()))
    args = [*tiers(tmp_path, "500blocks", "20000blocks"), TRACES["conversation"]]
    for i in range(int(os.environ.get("FLEXKV_KILLS", 5))):
        with subprocess.Popen([BIN, "replay", "--quiet", "--warm", *map(str, args)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE) as p:
            time.sleep(rng.uniform(0.05, 1.5))
            p.send_signal(signal.SIGKILL)
            said = p.stderr.read().decode()
        assert p.returncode in (-signal.SIGKILL, 0), said
        assert "WRONG" not in said
    got = replay("--warm", "--limit", 2000, *args)
    assert (got["wrong_blocks"], got["failed_blocks"]) == (0, 0)


def wait_for_requests(terminal, within=60):
    """Until the progress that is shown there counts some."""
    seen, end = b"", time.monotonic() + within
    while not re.search(rb"[1-9]\d* of \d+ requests", seen):
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], f"no progress: {seen!r}"
        seen += os.read(terminal, 4096)


def test_interrupt_ends_with_what_is_there(tmp_path):
    terminal, theirs = pty.openpty()
    with subprocess.Popen([BIN, "replay", "--json", "--speed", "1", *map(str, tiers(tmp_path)),
                           str(TRACES["conversation"])], stdout=subprocess.PIPE, stderr=theirs, text=True) as p:
        try:
            wait_for_requests(terminal)
            p.send_signal(signal.SIGINT)
            out, _ = p.communicate(timeout=30)
        finally:
            p.kill()
            os.close(terminal)
            os.close(theirs)
    assert p.returncode == 0
    assert 0 < json.loads(out)["requests"] < 12031


def test_speed_follows_the_clock_of_the_trace(tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", (0, [1]), (500, [1, 2]), (1000, [1, 2]))
    got = replay("--speed", 2, "--cpu", "10blocks", "--verify", trace)
    assert 0.5 <= got["seconds"] < 5
    assert got["hit_blocks"]["cpu"] == 3


# ---- output ----

def test_table_and_report(tmp_path):
    page = tmp_path / "r.html"
    done = run("--cpu", "10%", "--limit", 500, "--verify", "--report", page, TRACES["conversation"])
    assert done.returncode == 0, done.stderr
    assert "every byte was right" in done.stdout
    html = page.read_text()
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert html.count("<svg") == html.count("</svg>") == 4
    assert not re.search(r"<script|https?://|url\(|@import", html)
    assert "nan" not in html.lower().replace("nano", "") and "inf " not in html


def test_help():
    done = run("--help")
    assert done.returncode == 0
    for option in ("--cpu", "--ssd-dir", "--policy", "--verify", "--report", "--warm-restart-at"):
        assert option in done.stdout


def test_several_files(tmp_path):
    a = write_trace(tmp_path / "a.jsonl", (0, [1, 2, 3]))
    b = tmp_path / "b.jsonl.gz"
    b.write_bytes(gzip.compress(a.read_bytes()))
    assert replay("--hit-only", "--cpu", 10, a, b)["hit_blocks"]["cpu"] == 0
    assert replay("--hit-only", "--cpu", 10, "--join", a, b)["hit_blocks"]["cpu"] == 3


# ---- wrong input ----

GOOD = '{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n'


@pytest.mark.parametrize("text,says", [
    ("", "no request"),
    (GOOD + "{\n", "t.jsonl:2: "),
    (GOOD.replace("[1]", "[-1]"), "t.jsonl:1: negative number"),
    (GOOD.replace("[1]", '["1"]'), "expected a whole number"),
    (GOOD.replace("0", "NaN", 1), "expected a number"),
    (GOOD.replace("[1]", "[1, 2]") + GOOD.replace("[1]", "[2]"), "another prefix"),
    (GOOD.replace('"hash_ids"', '"ids"'), 'no "hash_ids"'),
    (GOOD.replace(": 0,", ": 9,") + GOOD, "is before"),
])
def test_wrong_traces(tmp_path, text, says):
    trace = tmp_path / "t.jsonl"
    trace.write_text(text)
    done = run("--hit-only", trace)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("args,says", [
    ([], "which trace"),
    (["/nonexistent.jsonl"], "No such file"),
    (["/"], "Is a directory"),
    (["--bogus", "T"], "unknown option --bogus"),
    (["--cpu"], "--cpu needs a value"),
    (["--cpu", "512", "T"], "a unit is missing"),
    (["--cpu", "-5%", "T"], "not a size"),
    (["--cpu", "5parsecs", "T"], 'unknown unit "parsecs"'),
    (["--cpu", "0", "--hit-only", "T"], "can't be empty"),
    (["--cpu", "9999999T", "T"], "too many"),
    (["--policy", "best", "T"], "--policy best: unknown"),
    (["--write-policy", "never", "T"], "--write-policy never: unknown"),
    (["--block-bytes", "100", "T"], "multiple of 64"),
    (["--tokens-per-block", "100", "T"], "must divide 512"),
    (["--tokens-per-block", "0", "T"], "must be a whole number"),
    (["--limit", "0", "T"], "--limit 0"),
    (["--speed", "0", "T"], "--speed 0"),
    (["--ssd", "5%", "T"], "--ssd needs --ssd-dir"),
    (["--warm-restart-at", "5", "T"], "needs --ssd"),
    (["--hit-only", "--verify", "T"], "--verify means nothing"),
    (["--policy", "belady", "--ssd", "5%", "T"], "one tier"),
    (["--fault", "gremlins=1", "T"], "gremlins"),
    (["--set", "cpu_cache_gb", "T"], "KEY=VALUE"),
    (["--set", "evict_rato=0.5", "T"], "evict_rat"),
    (["--hit-only", "--set", "evict_ratio=7", "T"], "evict_ratio"),
    (["--report", "/nonexistent/r.html", "T"], "/nonexistent/r.html: No such file"),
])
def test_wrong_usage(args, says):
    done = run(*[str(TRACES["synthetic"]) if a == "T" else a for a in args])
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stdout == ""


def test_directory_that_cannot_be_written():
    done = run("--ssd", "5%", "--ssd-dir", "/proc/nowhere", "--limit", 5, TRACES["synthetic"])
    assert done.returncode == 1
    assert "/proc/nowhere" in done.stderr
