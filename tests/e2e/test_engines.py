"""Engines on one daemon, played by fake_engine.py in processes of their own: bytes across engines, what `status` and
`top` say of them, and what the others notice when one of them is killed or stopped.

The library is FLEXKV_LIB, or src/libflexkv.so beside the program.
"""
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon_rig import BIN, DEADLINE, ROOT, clean_env, place, run, start, stop, stopped, wait_until  # noqa: F401

sys.path.insert(0, str(ROOT / "tests" / "crash"))
import slot_table       # noqa: E402

LIB = os.environ.get("FLEXKV_LIB", str(Path(BIN).parent / "src" / "libflexkv.so"))
FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
WORKERS = 2
PAGES_BUSY = 1

pytestmark = pytest.mark.skipif(not Path(LIB).exists(), reason=f"{LIB} is not built")


class Process:
    def __init__(self, role, address, space, instance, number, log):
        self.log = log
        with open(log, "ab") as err:
            command = [sys.executable, str(FAKE_ENGINE), role, address, space, instance, str(number)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
                                            bufsize=0,
                                            env=clean_env(LIBFLEXKV=LIB, FLEXKV_SERVER_TIMEOUT_MS="1000"))

    @property
    def pid(self):
        return self.process.pid

    def send(self, do, **args):
        self.process.stdin.write(json.dumps({"do": do, **args}).encode() + b"\n")

    def answer(self, within=DEADLINE):
        line, end = b"", time.monotonic() + within
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
                pytest.fail(f"no answer within {within} s; {self.log.read_text()[-2000:]}")
            got = os.read(self.process.stdout.fileno(), 65536)
            assert got, f"it ended: {self.log.read_text()[-2000:]}"
            line += got
        return json.loads(line)

    def ask(self, do, within=DEADLINE, **args):
        self.send(do, **args)
        return self.answer(within)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        self.process.stdin.close()
        self.process.stdout.close()


class Engine:
    """Workers that are started first, and a scheduler."""

    def __init__(self, place, address, instance, space="model"):
        self.args = (address, space, instance)
        self.log = place / f"{instance}.log"
        self.workers = [self.new("worker", w) for w in range(WORKERS)]
        self.scheduler = self.new("scheduler", WORKERS)

    def new(self, role, number):
        return Process(role, *self.args, number, self.log)

    def open(self):
        assert self.scheduler.ask("connect")["rc"] == 0
        return self.scheduler.ask("open")

    def opened(self):
        answer = self.open()
        assert answer["rc"] == 0, answer["error"]
        return self

    def fill(self, pages, seed):
        for w in self.workers:
            w.ask("fill", pages=pages, seed=seed)

    def put(self, seed, pages):
        self.fill(pages, seed)
        return self.scheduler.ask("put", seed=seed, pages=pages)

    def get(self, seed, pages):
        """Into pages that held something else."""
        self.fill(pages, f"not {seed}")
        return self.scheduler.ask("get", seed=seed, pages=pages)

    def has(self, seed, pages):
        return all(all(w.ask("check", pages=pages, seed=seed)["equal"]) for w in self.workers)

    def close(self):
        for p in [self.scheduler, *self.workers]:
            p.kill()


@pytest.fixture
def engine(place):                                                                      # noqa: F811
    engines = []

    def begin(daemon, instance, space="model"):
        engines.append(Engine(place, daemon.address, instance, space))
        return engines[-1]

    yield begin
    for e in engines:
        e.close()


def expect_stored(answer, blocks):
    assert (answer["rc"], answer["status"], answer["blocks_ok"]) == (0, 0, blocks), answer


def expect_loaded(engine_, answer, seed, pages):
    assert (answer["rc"], answer["matched"]) == (0, len(pages)), answer
    assert (answer["status"], answer["blocks_ok"]) == (0, len(pages)), answer
    assert engine_.has(seed, pages), "wrong bytes"


def works(engine_, seed="probe", pages=(60, 61)):
    """A put and a get of its own, with the bytes compared."""
    expect_stored(engine_.put(seed, list(pages)), len(pages))
    expect_loaded(engine_, engine_.get(seed, list(pages)), seed, list(pages))


def instance_of(daemon, name):
    found = [i for i in daemon.status()["instances"] if i["name"] == name and not i.get("ended")]
    return found[0] if found else None


# ---- what one stores, the other one gets ----

def test_engines_share_blocks_and_status_shows_them(start, engine):
    d = start("--set", "cpu_cache_gb=16M").ready()
    a, b = engine(d, "a").opened(), engine(d, "b").opened()
    expect_stored(a.put("x", list(range(20))), 20)
    got = b.get("x", list(range(40, 60)))
    expect_loaded(b, got, "x", list(range(40, 60)))
    b.fill([0, 1, 2], "nothing here")
    assert b.get("y", [0, 1, 2])["matched"] == 0

    status = d.status()
    assert [(s["name"], s["tokens_per_block"], s["ranks"], s["slice_bytes"], s["cpu_used"])
            for s in status["spaces"]] == [("model", 16, 2, 8192, 20)]
    assert {i["name"]: (i["workers"], i["registered"], i["client_pid"], sorted(g["pid"] for g in i["agents"]))
            for i in status["instances"]} == {
        e.args[2]: (2, 2, e.scheduler.pid, sorted(w.pid for w in e.workers)) for e in (a, b)}
    assert {a.scheduler.pid, b.scheduler.pid} <= {client["pid"] for client in status["clients"]}
    assert status["stats"]["puts"] == 1 and status["stats"]["cpu"]["hit_blocks"] == 20
    assert status["stats"]["cpu"]["bytes_read"] == status["stats"]["cpu"]["bytes_written"] == 20 * 2 * 8192

    text = run("status", d.address).stdout
    assert "20 of" in text and "instance a in space model: 2 of 2 workers" in text
    assert f"client {b.scheduler.pid}" in text and f"pid {a.scheduler.pid} for" in text
    screen = run("top", d.address, "--once", "--interval", "0.2").stdout
    assert all(len(line) <= 80 for line in screen.splitlines()), screen
    assert any(line.split()[:3] == ["b", "model", "2/2"] for line in screen.splitlines()), screen


def test_top_counts_per_second(start, engine):
    """Between its two looks, 2 s apart or more; when these are nobody tells, so there is work all the time."""
    d = start("--set", "cpu_cache_gb=16M").ready()
    a = engine(d, "a").opened()
    expect_stored(a.put("x", list(range(10))), 10)
    top = subprocess.Popen([BIN, "top", d.address, "--once", "--interval", "2"], stdout=subprocess.PIPE, text=True,
                           env=clean_env())
    gets, end = 0, time.monotonic() + DEADLINE
    while top.poll() is None and time.monotonic() < end:
        a.get("x", list(range(10)))
        gets += 1
        time.sleep(0.2)
    rows = {line.split()[0]: line.split() for line in top.communicate(timeout=DEADLINE)[0].splitlines() if line.strip()}
    per_second = [float(word) for word in rows["per"][2:]]
    in_all = int(rows["in"][2])
    assert 1 <= in_all <= gets and rows["in"][3:5] == [str(10 * in_all)] * 2
    assert 0 < per_second[0] <= in_all / 2 + 0.05               # as it is rounded
    assert per_second[1] == pytest.approx(10 * per_second[0], abs=0.6)


def test_missing_and_waiting_workers_are_named(start, engine):
    d = start().ready()
    a = engine(d, "a")
    wait_until(lambda: len(d.status()["waiting_agents"]) == WORKERS, message="the workers have not come")
    assert "worker 1 of instance a" in run("status", d.address).stdout
    a.workers[1].kill()
    wait_until(lambda: len(d.status()["waiting_agents"]) == 1)
    assert a.scheduler.ask("connect")["rc"] == 0
    answer = a.scheduler.ask("open", wait_ms=500)
    assert answer["rc"] < 0 and "1 of 2 workers" in answer["error"] and "missing: 1" in answer["error"]


# ---- two of a kind ----

def test_two_models(start, engine):
    d = start().ready()
    a = engine(d, "a", "llama").opened()
    second = engine(d, "b", "qwen").open()
    assert second["rc"] < 0 and "max_spaces" in second["error"] and "qwen" in second["error"]
    works(a)


def test_two_models_side_by_side(start, engine):
    d = start("--set", "max_spaces=2", "--set", "cpu_cache_gb=16M").ready()
    a, b = engine(d, "a", "llama").opened(), engine(d, "b", "qwen").opened()
    expect_stored(a.put("same prompt", [1, 2, 3]), 3)
    assert b.get("same prompt", [1, 2, 3])["matched"] == 0
    works(b)
    assert a.has("same prompt", [1, 2, 3])
    assert {s["name"]: s["cpu_used"] for s in d.status()["spaces"]} == {"llama": 3, "qwen": 2}


def test_a_name_has_one_engine(start, engine):
    d = start().ready()
    a = engine(d, "a").opened()
    second = engine(d, "a").open()
    assert second["rc"] < 0 and str(a.scheduler.pid) in second["error"] and '"a"' in second["error"]
    works(a)


# ---- life and death ----

def test_scheduler_kill_9(start, engine):
    d = start("--set", "cpu_cache_gb=16M").ready()
    a, b = engine(d, "a").opened(), engine(d, "b").opened()
    expect_stored(a.put("x", [0, 1, 2]), 3)
    assert a.scheduler.ask("match", seed="x", blocks=3)["lease"]
    assert d.status()["stats"]["leases"] == 1
    a.scheduler.kill()
    wait_until(lambda: instance_of(d, "a") is None, message="the instance stays")
    assert d.status()["stats"]["leases"] == 0
    expect_loaded(b, b.get("x", [5, 6, 7]), "x", [5, 6, 7])
    wait_until(lambda: len(d.status()["waiting_agents"]) == WORKERS, message="the workers have not come back")
    a.scheduler = a.new("scheduler", WORKERS)
    a.opened()
    expect_loaded(a, a.get("x", [9, 10, 11]), "x", [9, 10, 11])


def test_worker_kill_9(start, engine):
    d = start("--set", "cpu_cache_gb=16M").ready()
    a, b = engine(d, "a").opened(), engine(d, "b").opened()
    expect_stored(a.put("x", [0, 1, 2]), 3)
    a.workers[1].kill()
    wait_until(lambda: instance_of(d, "a")["registered"] == 1, message="the dead worker counts")
    assert "missing: 1" in run("status", d.address).stdout
    got = a.scheduler.ask("get", seed="x", pages=[4, 5, 6])
    assert got["rc"] < 0 or got["status"] < 0 or got["matched"] == 0, got
    works(b)
    a.workers[1] = a.new("worker", 1)
    wait_until(lambda: instance_of(d, "a")["registered"] == 2, message="the new worker is not taken")
    expect_loaded(a, a.get("x", [4, 5, 6]), "x", [4, 5, 6])
    wait_until(lambda: d.status()["stats"]["leases"] == 0 and d.status()["stats"]["operations"] == 0)


def test_worker_stopped(start, engine):
    d = start("--set", "cpu_cache_gb=16M", "--set", "op_timeout_ms=1000").ready()
    a, b = engine(d, "a").opened(), engine(d, "b").opened()
    expect_stored(a.put("x", [0, 1, 2]), 3)
    a.fill([4, 5, 6], "before")
    with stopped(a.workers[0].process):
        begin = time.monotonic()
        got = a.scheduler.ask("get", seed="x", pages=[4, 5, 6])
        assert got["status"] < 0 and got["blocks_ok"] == 0 and got["flags"] & PAGES_BUSY, got
        assert time.monotonic() - begin < 5
        works(b)
    expect_loaded(a, a.get("x", [7, 8, 9]), "x", [7, 8, 9])


def test_daemon_kill_9(start, engine):
    first = start("--set", "cpu_cache_gb=16M").ready()
    a = engine(first, "a").opened()
    expect_stored(a.put("x", [0, 1, 2]), 3)
    first.process.kill()
    first.wait()
    begin = time.monotonic()
    got = a.get("x", [4, 5, 6])
    assert got["rc"] == 0 and got["matched"] == 0 and time.monotonic() - begin < 3
    assert a.scheduler.ask("put", seed="x", pages=[0, 1, 2])["rc"] < 0
    wait_until(lambda: [w.ask("state")["state"] for w in a.workers] == [0, 0], within=2)
    second = start("--set", "cpu_cache_gb=16M").ready()
    wait_until(lambda: (instance_of(second, "a") or {"registered": 0})["registered"] == WORKERS,
               message="the engine has not come back")
    wait_until(lambda: a.scheduler.ask("put", seed="first", pages=[0])["rc"] == 0, message="puts are not taken")
    works(a)
    assert a.get("x", [4, 5, 6])["matched"] == 0, "blocks of a dead daemon's memory"


def test_daemon_kill_9_and_what_was_on_ssd(start, engine, place):                       # noqa: F811
    options = ["--set", "cpu_cache_gb=16M", "--set", "ssd_cache_gb=16M", "--set", f"ssd_cache_dir={place}/ssd"]
    (place / "ssd").mkdir()
    first = start(*options).ready()
    a = engine(first, "a").opened()
    expect_stored(a.put("x", list(range(16))), 16)
    wait_until(lambda: len(slot_table.read_records([place / "ssd"], "model")) == 16, message="there are no records")
    first.process.kill()
    first.wait()
    start(*options).ready()
    wait_until(lambda: a.scheduler.ask("match", seed="x", blocks=16)["ssd"] == 16,
               message="the SSD's blocks are not there")
    pages = list(range(20, 36))
    expect_loaded(a, a.get("x", pages), "x", pages)


def test_daemon_stopped(start, engine):
    d = start("--set", "cpu_cache_gb=16M").ready()
    a = engine(d, "a").opened()
    expect_stored(a.put("x", [0, 1, 2]), 3)
    with stopped(d.process):
        begin = time.monotonic()
        assert a.scheduler.ask("get", seed="x", pages=[4, 5, 6])["matched"] == 0
        assert time.monotonic() - begin < 3                     # server_timeout_ms is 1 s
        begin = time.monotonic()
        assert a.scheduler.ask("match", seed="x", blocks=3)["matched"] == 0
        assert time.monotonic() - begin < 2
    wait_until(lambda: a.scheduler.ask("match", seed="x", blocks=3)["matched"] == 3, message="its blocks are lost")
    expect_loaded(a, a.get("x", [4, 5, 6]), "x", [4, 5, 6])


def test_nothing_is_left_of_engines(start, engine):
    d = start("--set", "cpu_cache_gb=16M").ready()
    e = engine(d, "warm up").opened()
    works(e)
    e.close()
    wait_until(lambda: not d.status()["instances"] and not d.status()["waiting_agents"])
    wait_until(lambda: len(d.status()["clients"]) <= 1)
    fds, tasks = d.fds(), len(os.listdir(f"/proc/{d.pid}/task"))
    maps = Path(f"/proc/{d.pid}/maps").read_text().count("memfd")
    for round_ in range(4):
        e = engine(d, f"e{round_}").opened()
        expect_stored(e.put(round_, [0, 1]), 2)
        assert e.scheduler.ask("match", seed=round_, blocks=2)["lease"]
        e.close()                                               # kill -9 of all of it
    wait_until(lambda: not d.status()["instances"] and not d.status()["waiting_agents"], message="instances stay")
    wait_until(lambda: d.fds() <= fds, message="descriptors stay")
    wait_until(lambda: len(os.listdir(f"/proc/{d.pid}/task")) <= tasks, message="threads stay")
    wait_until(lambda: Path(f"/proc/{d.pid}/maps").read_text().count("memfd") <= maps, message="memory stays")
    assert d.status()["stats"]["leases"] == 0 and d.status()["stats"]["operations"] == 0
    assert d.stop(within=DEADLINE) == 0


def test_the_end_does_not_wait_for_other_processes(start, engine):
    """A worker that stands still has a mapping of its own: nobody is harmed if it goes on copying."""
    d = start("--set", "cpu_cache_gb=16M").ready()
    a = engine(d, "a").opened()
    expect_stored(a.put("x", [0, 1, 2]), 3)
    stop(a.workers[0].process)
    a.scheduler.send("get", seed="x", pages=[4, 5, 6])
    wait_until(lambda: d.status()["stats"]["operations"] == 1)
    assert d.stop(within=5) == 0


def test_idle_exit_after_engines(start, engine):
    d = start("--exit-when-idle", "0.5").ready()
    e = engine(d, "a").opened()
    time.sleep(1.5)
    works(e)
    e.scheduler.kill()
    assert d.wait() == 0
    wait_until(lambda: [w.ask("state")["state"] for w in e.workers] == [0, 0], within=2)
