"""FlexKV's own Mooncake wire against the engine of Mooncake's wheel, unmodified: it reads from ours and we from it,
with P2PHANDSHAKE and with an HTTP metadata server (Mooncake's), bytes compared.

Run by the python of tools/mooncake-env; FLEXKV_BUILD names the build folder that has tests/transport/moon_peer.
"""
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PEER = Path(os.environ.get("FLEXKV_BUILD", HERE.parents[1] / "build")) / "tests/transport/moon_peer"
SLOTS, SLOT_BYTES = 16, 256 << 10


def slot(s):
    i = range(SLOT_BYTES)
    return bytes((s * 37 + k * 11 + (k >> 8)) & 255 for k in i)


SLOT = [slot(s) for s in range(SLOTS)]


def read_line(stream, seconds=30):
    """One line, unbuffered, within the time."""
    line, end = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(line)
        c = os.read(stream.fileno(), 1)
        if not c:
            raise EOFError(line)
        line += c
    return line.decode()


class Process:
    def __init__(self, *args):
        self.p = subprocess.Popen([str(a) for a in args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def stop(self):
        self.p.stdin.close()
        try:
            self.p.wait(20)
        except subprocess.TimeoutExpired:
            self.p.kill()
        self.p.wait()
        self.p.stdout.close()
        return self.p.returncode


class Engine(Process):
    def __init__(self, name, metadata):
        super().__init__(sys.executable, HERE / "moon_engine.py", name, metadata)
        said = self.answer()
        assert "error" not in said, said
        self.segment, self.base = said["segment"], said["base"]

    def answer(self):
        while True:                     # the library writes lines of its own
            line = read_line(self.p.stdout, 60)
            if line.startswith("@"):
                return json.loads(line[1:])

    def order(self, **what):
        self.p.stdin.write(json.dumps(what).encode() + b"\n")
        return self.answer()


class Owner(Process):
    def __init__(self, metadata, name=""):
        super().__init__(PEER, "owner", "127.0.0.1:0", metadata, name)
        segment, base, slots, slot_bytes = read_line(self.p.stdout).split()
        self.segment, self.base = segment, int(base)
        assert (int(slots), int(slot_bytes)) == (SLOTS, SLOT_BYTES)


@pytest.fixture(params=["P2PHANDSHAKE", "http"])
def metadata(request):
    if request.param == "P2PHANDSHAKE":
        yield request.param
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--port",
                               str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/metadata"
    server.send_signal(signal.SIGKILL)
    server.wait()


@pytest.fixture
def owner(metadata):
    o = Owner(metadata, "" if metadata == "P2PHANDSHAKE" else "flexkv-node")
    yield o
    o.stop()


@pytest.fixture
def engine(metadata):
    e = Engine("127.0.0.1:0" if metadata == "P2PHANDSHAKE" else "moon-node", metadata)
    yield e
    e.stop()


def test_engine_reads_from_us(owner, engine, tmp_path):
    out = tmp_path / "out"
    for s, at, size in [(0, 0, 1), (1, 0, SLOT_BYTES), (5, 1000, 70001), (8, 17, 3 * SLOT_BYTES)]:
        rc = engine.order(do="read", peer=owner.segment, address=owner.base + s * SLOT_BYTES + at, bytes=size,
                          into=str(out))["rc"]
        assert rc == 0
        assert out.read_bytes() == b"".join(SLOT[s:])[at:at + size]
    rc = engine.order(do="batch", peer=owner.segment, address=owner.base + 4 * SLOT_BYTES, bytes=SLOT_BYTES, n=12,
                      into=str(out))["rc"]
    assert rc == 0
    assert out.read_bytes() == b"".join(SLOT[4:])


def test_engine_is_refused(owner, engine, tmp_path):
    out = tmp_path / "out"
    for address, size in [(owner.base + 3 * SLOT_BYTES, 100), (owner.base + SLOTS * SLOT_BYTES, 1),
                          (owner.base + SLOTS * SLOT_BYTES - 1, 2), (4096, 8)]:
        assert engine.order(do="read", peer=owner.segment, address=address, bytes=size, into=str(out))["rc"] != 0
        assert not any(out.read_bytes())
    assert engine.order(do="write", peer=owner.segment, address=owner.base, bytes=4096)["rc"] != 0
    rc = engine.order(do="read", peer=owner.segment, address=owner.base, bytes=SLOT_BYTES, into=str(out))["rc"]
    assert rc == 0 and out.read_bytes() == SLOT[0]


def test_we_read_from_engine(engine, metadata):
    assert engine.order(do="fill")["rc"] == 0
    pattern = bytes((i * 7 + (i >> 8)) & 255 for i in range(1 << 20)) * 8
    for at, size, n in [(0, 1, 1), (5, 70001, 30), (0, 1 << 20, 8), (0, 4096, 1000)]:
        r = subprocess.run([PEER, "read", metadata, engine.segment, str(engine.base + at), str(size), str(n)],
                           capture_output=True, timeout=60)
        assert r.returncode == 0, r.stderr
        assert r.stdout == pattern[at:at + size * n]
    r = subprocess.run([PEER, "read", metadata, engine.segment, "4096", "100", "1"], capture_output=True, timeout=60)
    assert r.returncode == 2            # the engine refuses what it has not registered


def test_we_read_blocks_from_us(owner, metadata):
    r = subprocess.run([PEER, "blocks", metadata, owner.segment], capture_output=True, timeout=60)
    assert r.returncode == 0, r.stderr
    assert int(r.stdout) == SLOTS - 1   # one is not shared


def test_our_segment_is_taken_back(metadata):
    if metadata == "P2PHANDSHAKE":
        pytest.skip("there is no metadata server")
    url = metadata + "?key=mooncake%2Fram%2Fflexkv-node"
    o = Owner(metadata, "flexkv-node")
    assert json.load(urllib.request.urlopen(url))["tcp_proto_version"] == 2
    assert o.stop() == 0
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(url)
    assert e.value.code == 404
