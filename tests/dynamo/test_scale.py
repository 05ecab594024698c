"""examples/dynamo/routing.py with a small trace and small tiers: its table adds up, the router gives
credit for what FlexKV's events say, loads find what was announced, and nothing is left behind."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from deployment import marked

ROOT = Path(__file__).resolve().parents[2]
SESSIONS, TURNS = 16, 7
REQUESTS = SESSIONS * TURNS
SYSTEM, FIRST, TURN = 2, 4, 3       # blocks: of all sessions, of a session's first request, more of each next one
SIZES = {"gpu": 40, "cpu": 60, "ssd": 1000}     # a worker's share of all sessions is 100 blocks


def write_trace(path):
    """Sessions whose turns come one after the other, all sessions mixed."""
    numbers, order, turn = random.Random(11), list(range(SESSIONS)) * TURNS, [0] * SESSIONS
    numbers.shuffle(order)
    with open(path, "w") as out:
        for n, session in enumerate(order):
            own = FIRST + TURN * turn[session]
            ids = [*range(SYSTEM), *(1000 * (session + 1) + i for i in range(own))]
            turn[session] += 1
            out.write(json.dumps({"timestamp": 300 * n, "input_length": 512 * len(ids) - 100,
                                  "output_length": 40, "hash_ids": ids}) + "\n")


@pytest.fixture(scope="module")
def rows(folder):
    place = folder / "scale"
    place.mkdir()
    write_trace(folder / "trace.jsonl")
    out = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/dynamo/routing.py", "--trace", folder / "trace.jsonl", "--json", out,
         "--block", "16", "--seconds", "100", "--rows", "kv+flexkv,kv,round-robin+flexkv",
         *(str(word) for name, n in SIZES.items() for word in (f"--{name}", n))],
        env=os.environ | {"TMPDIR": str(place)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(place.iterdir()), "a folder is left"
    assert not marked(folder), "processes are left"
    return {row["row"]: row for row in json.loads(out.read_text())}


def reused(row):
    return row["prompt_tokens"] - row["tokens"]["new"]


def test_the_figures_add_up(rows):
    assert len(rows) == 3
    for row in rows.values():
        assert row["requests"] == sum(row["per_worker"]) == REQUESTS
        assert sum(row["tokens"].values()) == row["prompt_tokens"]
        assert sum(row["computed_per_worker"]) == row["tokens"]["new"]
        assert 0 < row["ttft_p50"] <= row["ttft_p99"]
    assert len({row["prompt_tokens"] for row in rows.values()}) == 1
    shares = rows["round-robin+flexkv"]["per_worker"]
    assert max(shares) - min(shares) <= 1


def test_flexkv_adds_to_what_the_gpu_has(rows):
    on, off = rows["kv+flexkv"], rows["kv"]
    assert off["tokens"]["cpu"] == off["tokens"]["ssd"] == 0 < off["tokens"]["gpu"]
    assert on["tokens"]["cpu"] > 0 and on["tokens"]["ssd"] > 0
    assert reused(on) > reused(off)


def test_the_router_knows_the_tiers(rows):
    """All but a few: an event may be under way when the next request comes."""
    for name in ("kv+flexkv", "kv"):
        assert rows[name]["credit_as_announced"] >= 0.9 * REQUESTS
    on = rows["kv+flexkv"]
    assert on["tokens"]["cpu"] + on["tokens"]["ssd"] >= 0.9 * on["announced"]
