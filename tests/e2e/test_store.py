"""Daemons with a directory that they share (enable_3rd_remote): what engines of one stored engines of the other load, also
when the first has been killed; `status`; settings that can't be; a limit that both keep.
"""
import signal
from pathlib import Path

import pytest

from daemon_rig import place, run, start, wait_until  # noqa: F401
from test_engines import LIB, engine, expect_loaded, expect_stored  # noqa: F401

pytestmark = pytest.mark.skipif(not Path(LIB).exists(), reason=f"{LIB} is not built")

BLOCK = 2 * 8192
FILE = 4096 + BLOCK


def shared(place, **more):
    options = {"enable_3rd_remote": 1, "remote_cache_dir": place / "shared", "remote_scan_ms": 50,
               "remote_retry_ms": 50, **more}
    return [part for key, value in options.items() for part in ("--set", f"{key}={value}")]


def store(daemon):
    return daemon.status()["store"]


def test_what_one_stored_the_other_loads_also_after_a_kill(start, place, engine):
    a = start(*shared(place), address=f"ipc://{place}/a").ready()
    b = start(*shared(place), address=f"ipc://{place}/b").ready()
    one = engine(a, "one").opened()
    for seed in range(5):
        expect_stored(one.put(seed, list(range(8))), 8)
    wait_until(lambda: store(a)["written_blocks"] == 40)
    a.process.send_signal(signal.SIGKILL)
    a.wait()

    two = engine(b, "two").opened()
    for seed in range(5):
        wait_until(lambda: two.scheduler.ask("match", seed=seed, blocks=8)["matched"] == 8)
        expect_loaded(two, two.get(seed, list(range(20, 28))), seed, list(range(20, 28)))
    told = store(b)
    assert told["read_blocks"] == 40 and told["bad"] == 0 and told["written_blocks"] == 0
    assert told["reads"] and told["writes"] and told["used_bytes"] == 40 * FILE
    assert b.stop(within=20) == 0, b.log()


def test_a_limit_that_both_keep(start, place, engine):
    limit = 30 * FILE
    daemons = [start(*shared(place, remote_cache_gb=f"{limit // 1024}K"), address=f"ipc://{place}/{n}").ready() for n in "ab"]
    engines = [engine(d, n).opened() for d, n in zip(daemons, ("one", "two"))]
    for seed in range(12):
        expect_stored(engines[seed % 2].put(seed, list(range(8))), 8)

    def bytes_there():
        return sum(f.stat().st_size for f in (place / "shared").rglob("data/*/*") if not f.name.startswith("."))

    wait_until(lambda: sum(store(d)["evicted"] for d in daemons) >= 96 - 30 and bytes_there() <= limit,
               message=f"the store has {bytes_there()} bytes, the limit is {limit}")
    assert not list((place / "shared").rglob(".tmp-*"))
    for d in daemons:
        assert d.stop(within=20) == 0, d.log()


def test_settings_that_cannot_be(place):
    done = run("serve", "--address", f"ipc://{place}/s", "--set", "enable_3rd_remote=1")
    assert done.returncode != 0 and "remote_cache_dir" in done.stderr
    (place / "file").write_text("")
    done = run("serve", "--address", f"ipc://{place}/s", *shared(place, remote_cache_dir=place / "file"))
    assert done.returncode != 0 and f"remote_cache_dir {place}/file" in done.stderr
