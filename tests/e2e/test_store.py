"""Daemons with a place that they share (enable_3rd_remote): what engines of one stored engines of the other load, also
when the first has been killed; `status`; settings that can't be; a limit that both keep. A directory; and, where
FLEXKV_TEST_S3 names the python of tools/s3-env and FLEXKV_TEST_NIXL the folder of NIXL's C library, a bucket of a real S3
server, which is killed, stopped, locked.
"""
import os
import signal
import subprocess
from pathlib import Path

import pytest

from daemon_rig import ROOT, place, run, start, stopped, wait_until  # noqa: F401
from test_engines import LIB, engine, expect_loaded, expect_stored  # noqa: F401

pytestmark = pytest.mark.skipif(not Path(LIB).exists(), reason=f"{LIB} is not built")

BLOCK = 2 * 8192
FILE = 4096 + BLOCK
PYTHON, NIXL = os.environ.get("FLEXKV_TEST_S3"), os.environ.get("FLEXKV_TEST_NIXL", "")


class Directory:
    def __init__(self, place):                                                          # noqa: F811
        self.options = {"remote_cache_dir": place / "shared"}
        self.env = {}


class Bucket:
    """A bucket of an S3 server that is not ours."""

    def __init__(self, place):                                                          # noqa: F811
        self.process, self.port = None, 0
        self.serve()
        self.options = {"remote_backend": "nixl", "remote_bucket": "flexkv-test", "nixl_library": NIXL,
                        "remote_endpoint": f"http://127.0.0.1:{self.port}", "remote_timeout_ms": 4000}

    def serve(self, *more):
        self.process = subprocess.Popen([PYTHON, "tests/store/s3.py", "serve", str(self.port), *more], cwd=ROOT, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        said = self.process.stdout.readline().split()
        assert said, "the S3 server does not start"
        self.port = int(said[0])
        key, secret = said[1:] or ("test", "test")
        self.env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    def kill(self):
        self.process.kill()
        self.process.wait()

    def objects(self):
        done = subprocess.run([PYTHON, "tests/store/s3.py", "list", str(self.port), "flexkv"], cwd=ROOT, text=True,
                              capture_output=True, timeout=60, check=True)
        return done.stdout.split()

    def do(self, what, *more):
        subprocess.run([PYTHON, "tests/store/s3.py", what, str(self.port), "flexkv", *map(str, more)], cwd=ROOT, timeout=60,
                       check=True)


@pytest.fixture(params=["directory", pytest.param("bucket", marks=pytest.mark.bucket)])
def shared_place(request, place):                                                       # noqa: F811
    thing = (Bucket if request.param == "bucket" else Directory)(place)
    yield thing
    if request.param == "bucket":
        thing.kill()


@pytest.fixture
def bucket(place):                                                                      # noqa: F811
    thing = Bucket(place)
    yield thing
    thing.kill()


def options(where, **more):
    chosen = {"enable_3rd_remote": 1, "remote_scan_ms": 50, "remote_retry_ms": 50, **where.options, **more}
    return [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]


def store(daemon):
    return daemon.status()["store"]


@pytest.fixture
def daemon(start, place):                                                               # noqa: F811
    """One of a name that uses a place which others may use too."""
    def begin(name, where, **more):
        return start(*options(where, **more), address=f"ipc://{place}/{name}", env=where.env).ready()

    return begin


@pytest.fixture
def daemon_that_stored(daemon, engine):                                                 # noqa: F811
    """It and its engine, whose prompts of 8 blocks are in the place."""
    def begin(where, prompts=1):
        a = daemon("a", where)
        one = engine(a, "one").opened()
        for seed in range(prompts):
            expect_stored(one.put(seed, list(range(8))), 8)
        wait_until(lambda: store(a)["written_blocks"] == 8 * prompts)
        return a, one

    return begin


def test_what_one_stored_the_other_loads_also_after_a_kill(daemon, daemon_that_stored, engine, shared_place):    # noqa: F811
    b = daemon("b", shared_place)
    a, _ = daemon_that_stored(shared_place, prompts=5)
    scans = store(a)["scans"]           # in a bucket others are told at a scan
    wait_until(lambda: store(a)["scans"] >= scans + 2)
    a.process.send_signal(signal.SIGKILL)
    a.wait()

    two = engine(b, "two").opened()
    for seed in range(5):
        wait_until(lambda: two.scheduler.ask("match", seed=seed, blocks=8)["matched"] == 8)
        expect_loaded(two, two.get(seed, list(range(20, 28))), seed, list(range(20, 28)))
    told = store(b)
    assert told["read_blocks"] == 40 and told["bad"] == 0 and told["written_blocks"] == 0
    assert told["kind"] == shared_place.options.get("remote_backend", "directory")
    assert told["reads"] and told["writes"] and told["used_bytes"] == 40 * FILE
    assert b.stop(within=20) == 0, b.log()


def test_a_limit_that_both_keep(daemon, place, engine):                                 # noqa: F811
    limit = 30 * FILE
    daemons = [daemon(n, Directory(place), remote_cache_gb=f"{limit // 1024}K") for n in "ab"]
    engines = [engine(d, n).opened() for d, n in zip(daemons, ("one", "two"))]
    for seed in range(12):
        expect_stored(engines[seed % 2].put(seed, list(range(8))), 8)

    def size(file):
        try:
            return file.stat().st_size
        except FileNotFoundError:                       # evicted since it was listed
            return 0

    def bytes_there():
        return sum(size(f) for f in (place / "shared").rglob("data/*/*") if not f.name.startswith("."))

    wait_until(lambda: sum(store(d)["evicted"] for d in daemons) >= 96 - 30 and bytes_there() <= limit,
               message=f"the limit of {limit} bytes is not kept")
    assert not list((place / "shared").rglob(".tmp-*"))
    for d in daemons:
        assert d.stop(within=20) == 0, d.log()


def test_settings_that_cannot_be(place):
    done = run("serve", "--address", f"ipc://{place}/s", "--set", "enable_3rd_remote=1")
    assert done.returncode != 0 and "remote_cache_dir" in done.stderr
    (place / "file").write_text("")
    done = run("serve", "--address", f"ipc://{place}/s", *options(Directory(place), remote_cache_dir=place / "file"))
    assert done.returncode != 0 and f"remote_cache_dir {place}/file" in done.stderr


# ---- a bucket ----

@pytest.mark.bucket
def test_objects_that_are_gone_or_not_right(daemon, daemon_that_stored, engine, bucket):         # noqa: F811
    a, _ = daemon_that_stored(bucket, prompts=3)
    assert a.stop(within=20) == 0, a.log()
    assert sum("/log-" in name for name in bucket.objects()) == 1

    bucket.do("spoil", 5)
    b = daemon("b", bucket)
    two = engine(b, "two").opened()
    wait_until(lambda: store(b)["blocks"] == 24)
    for seed in range(3):
        two.get(seed, list(range(20, 28)))      # what comes is looked at below
    told = store(b)
    assert 1 <= told["bad"] <= 5 and told["read_blocks"] <= 19 + 5
    bucket.do("drop")
    assert b.stop(within=20) == 0, b.log()
    c = daemon("c", bucket)
    three = engine(c, "three").opened()
    wait_until(lambda: store(c)["blocks"] > 0)
    assert three.get(0, list(range(8)))["blocks_ok"] == 0
    assert store(c)["missing"] > 0 and store(c)["reads"]
    expect_stored(three.put(1, list(range(8))), 8)
    assert c.stop(within=20) == 0, c.log()


@pytest.mark.bucket
def test_a_server_that_is_killed_and_comes_back(daemon, daemon_that_stored, engine, bucket):     # noqa: F811
    a, one = daemon_that_stored(bucket)
    bucket.kill()
    wait_until(lambda: not store(a)["reads"], within=40)
    expect_stored(one.put(1, list(range(8))), 8)                    # memory goes on
    expect_loaded(one, one.get(1, list(range(20, 28))), 1, list(range(20, 28)))
    bucket.serve()                                                  # without what it had
    wait_until(lambda: store(a)["reads"] and store(a)["writes"], within=60)
    expect_stored(one.put(2, list(range(8))), 8)
    wait_until(lambda: any("/data/" in name for name in bucket.objects()))

    b = daemon("b", bucket)
    two = engine(b, "two").opened()
    wait_until(lambda: two.scheduler.ask("match", seed=2, blocks=8)["matched"] == 8, within=40,
               message=lambda: f"a: {store(a)}, b: {store(b)}, objects: {bucket.objects()}: it is not found")
    expect_loaded(two, two.get(2, list(range(20, 28))), 2, list(range(20, 28)))
    for d in (a, b):
        assert d.stop(within=20) == 0, d.log()


@pytest.mark.bucket
def test_a_bucket_that_somebody_empties(daemon, engine, bucket):                        # noqa: F811
    """What is written before that is seen is written once more, where others find it."""
    a = daemon("a", bucket, remote_scan_ms=6000)
    one = engine(a, "one").opened()
    bucket.do("empty")
    expect_stored(one.put(1, list(range(8))), 8)
    wait_until(lambda: store(a)["written_blocks"] >= 8)

    b = daemon("b", bucket)
    two = engine(b, "two").opened()
    wait_until(lambda: two.scheduler.ask("match", seed=1, blocks=8)["matched"] == 8, within=40,
               message=lambda: f"a: {store(a)}, b: {store(b)}, objects: {bucket.objects()}: it is not found")
    expect_loaded(two, two.get(1, list(range(20, 28))), 1, list(range(20, 28)))
    assert store(a)["blocks"] == 8 and store(a)["outs"] == 0
    for d in (a, b):
        assert d.stop(within=20) == 0, d.log()


@pytest.mark.bucket
def test_a_server_that_stands_still(daemon_that_stored, bucket):
    a, one = daemon_that_stored(bucket)
    with stopped(bucket.process):
        expect_stored(one.put(1, list(range(8))), 8)
        wait_until(lambda: not store(a)["reads"], within=40)
        expect_loaded(one, one.get(0, list(range(20, 28))), 0, list(range(20, 28)))
        assert a.stop(within=30) == 0, a.log()                      # closes, whatever the server does


@pytest.mark.bucket
def test_who_may_not(daemon, place, bucket):                                            # noqa: F811
    bucket.kill()
    bucket.serve("locked")
    a = daemon("a", bucket)
    assert a.stop(within=20) == 0, a.log()
    done = run("serve", "--address", f"ipc://{place}/s", *options(bucket), env={**bucket.env, "AWS_SECRET_ACCESS_KEY": "wrong"})
    assert done.returncode != 0 and "AWS_SECRET_ACCESS_KEY" in done.stderr and "flexkv-test" in done.stderr, done.stderr
    assert bucket.env["AWS_SECRET_ACCESS_KEY"] not in done.stderr + a.log()
