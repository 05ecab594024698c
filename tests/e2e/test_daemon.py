"""`flexkv serve`, `status` and `top` as their users see them: starting, stopping, addresses, what a kill -9 or a
SIGSTOP leaves behind, the terminal.

The program is FLEXKV_BIN (default build/flexkv). Every test has a directory of its own, and every daemon that a test
starts is gone when it ends.
"""
import fcntl
import os
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from daemon_rig import BIN, DEADLINE, PROMPT, clean_env, place, run, start, stopped, wait_until  # noqa: F401


def abstract_name(place):
    return f"@flexkv-test-{place.name}"


def sockets_named(part):
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if part in line]


# ---- starting and stopping ----

@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_start_and_stop(start, place, sig):
    d = start()
    told = d.told()
    assert told.splitlines() == ["READY=1", f"STATUS=Serving at {d.address}"]
    assert f"serving at {d.address}, cpu tier 4M, ssd tier none" in d.log()
    assert (place / "s").stat().st_mode & 0o777 == 0o600
    assert run("status", d.address).returncode == 0
    assert d.stop(sig) == 0, d.log()
    assert d.told() == "STOPPING=1"
    assert not (place / "s").exists()
    assert not sockets_named(str(place / "s"))
    assert run("status", d.address).returncode == 1


def test_signals_are_seen_at_once_whenever_they_come(start, place):
    """Also in the middle of the start, and while clients come and go. Before the program has set up its signals it
    ends by the signal itself; nothing is left either way."""
    rng = random.Random(7)
    for round_ in range(12):
        d = start()
        if round_ % 2:
            d.ready()
            client = subprocess.Popen([BIN, "status", d.address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                      env=clean_env())
            time.sleep(rng.uniform(0, 0.02))
        else:
            client = None
            time.sleep(rng.uniform(0, 0.06))
        begin = time.monotonic()
        status = d.stop()
        assert status == 0 or (client is None and status == -signal.SIGTERM), d.log()
        assert time.monotonic() - begin < PROMPT
        if client:
            assert client.wait(DEADLINE) in (0, 1)
        assert not (place / "s").exists()


def test_a_log_that_nobody_reads_is_no_reason_to_end(place):
    ours, theirs = os.pipe()
    d = subprocess.Popen([BIN, "serve", "--address", f"ipc://{place}/s", "--set", "cpu_cache_gb=4M"], stderr=theirs,
                         stdin=subprocess.DEVNULL, env=clean_env())
    try:
        os.close(theirs)
        os.close(ours)
        wait_until(lambda: run("status", f"ipc://{place}/s").returncode == 0, message="it did not serve")
        d.terminate()
        assert d.wait(PROMPT) == 0
    finally:
        d.kill()
        d.wait(DEADLINE)


# ---- addresses ----

def test_address_in_use(start, place):
    first = start().ready()
    second = start()
    assert second.wait() == 3
    assert f"in use by process {first.pid}" in second.log() and "server_recv_port" in second.log()
    assert first.status()["pid"] == first.pid
    first.stop()
    assert start().ready().stop() == 0


def test_a_socket_left_by_kill_9_is_replaced(start, place):
    first = start().ready()
    first.process.kill()
    assert first.wait() == -signal.SIGKILL
    assert (place / "s").is_socket()
    done = run("status", first.address)
    assert done.returncode == 1 and "nobody answers" in done.stderr
    second = start().ready()
    assert second.status()["pid"] == second.pid
    assert second.stop() == 0
    assert os.listdir(place) and not (place / "s").exists()


def test_the_address_of_a_stopped_daemon_is_not_taken(start):
    first = start().ready()
    with stopped(first.process):
        assert start().wait() == 3
    assert first.status()["pid"] == first.pid


def test_a_file_that_is_no_socket_is_left_alone(start, place):
    (place / "s").write_text("precious")
    d = start()
    assert d.wait() == 1
    assert "no socket" in d.log().replace("\n", " ")
    assert (place / "s").read_text() == "precious"


def test_abstract_address(start, place):
    name = abstract_name(place)
    d = start(address=f"ipc://{name}").ready()
    assert d.status()["address"] == f"ipc://{name}"
    assert start(address=f"ipc://{name}").wait() == 3
    d.process.kill()
    d.wait()
    assert not sockets_named(name)
    again = start(address=f"ipc://{name}").ready()
    assert again.stop() == 0
    assert not sockets_named(name)


def test_many_at_one_address_one_wins(start):
    daemons = [start() for _ in range(5)]
    wait_until(lambda: sum(d.process.poll() is not None for d in daemons) == 4, message="four have not given up")
    assert sorted(d.process.poll() for d in daemons if d.process.poll() is not None) == [3, 3, 3, 3]
    left = [d for d in daemons if d.process.poll() is None]
    assert left[0].ready().status()["pid"] == left[0].pid


def test_the_address_from_the_options(start, place):
    env = {"FLEXKV_SERVER_RECV_PORT": f"ipc://{place}/env"}
    d = start(address=None, env=env).ready()
    assert run("status", env=env).returncode == 0
    assert (place / "env").is_socket()
    assert d.stop() == 0
    (place / "node.yaml").write_text(f"server_recv_port: ipc://{place}/file\ncpu_cache_gb: 4M\n")
    d = start("--config", place / "node.yaml", address=None).ready()
    assert run("status", f"ipc://{place}/file").returncode == 0
    assert d.stop() == 0
    d = start("--set", f"server_recv_port=ipc://{place}/set", address=None, env=env).ready()
    assert run("status", f"ipc://{place}/set").returncode == 0


@pytest.mark.parametrize("args, status, why", [
    (["--nonsense"], 2, "nonsense"),
    (["argument"], 2, "argument"),
    (["--exit-when-idle", "soon"], 2, "soon"),
    (["--exit-when-idle", "-1"], 2, "-1"),
    (["--set", "cpu_cache_gb"], 2, "KEY=VALUE"),
    (["--set", "cpu_cache_gb=much"], 1, "is not a size"),
    (["--set", "cpu_cache_gbs=1"], 1, "did you mean cpu_cache_gb"),
    (["--config", "/nonexistent/f.yaml"], 1, "/nonexistent/f.yaml"),
    (["--address", "tcp://127.0.0.1:1"], 1, "ipc://PATH"),
    (["--address", "ipc://" + "x" * 120], 1, "server_recv_port"),
    (["--address", "ipc:///nonexistent/s"], 1, "No such file or directory"),
    (["--address", ""], 2, "empty"),
])
def test_wrong_usage(args, status, why):
    done = run("serve", "--set", "cpu_cache_gb=4M", *args)
    assert done.returncode == status, done.stderr
    assert why in done.stderr


# ---- idle ----

def test_who_only_looks_is_no_client(start):
    """test_engines.py has the idle exit after real ones."""
    d = start("--exit-when-idle", 0.2).ready()
    assert run("status", d.address).returncode == 0
    time.sleep(1.5)
    assert d.process.poll() is None, "it left before its first engine came"


# ---- status ----

def test_status_json(start):
    d = start().ready()
    got = d.status()
    assert got["pid"] == d.pid
    assert got["address"] == d.address
    assert 0 <= got["uptime_s"] < DEADLINE
    assert re.fullmatch(r"\d+\.\d+\.\d+", got["version"])
    assert got["spaces"] == [] and got["instances"] == [] and got["waiting_agents"] == []
    assert isinstance(got["clients"], list)
    assert got["stats"]["matches"] == 0 and got["stats"]["cpu"]["hit_blocks"] == 0
    assert {"gets", "puts", "leases", "operations", "ssd", "declined_blocks"} <= set(got["stats"])


def test_status_text(start):
    d = start().ready()
    done = run("status", d.address)
    assert done.returncode == 0 and done.stderr == ""
    first = done.stdout.splitlines()[0]
    assert f"pid {d.pid}" in first and d.address in first
    assert "no clients" in done.stdout


def test_nobody_answers(place):
    for command in ("status", "top"):
        done = run(command, f"ipc://{place}/nobody")
        assert done.returncode == 1 and done.stdout == ""
        assert "nobody answers" in done.stderr and f"{place}/nobody" in done.stderr


def test_a_stopped_daemon_is_given_up_in_time(start):
    d = start().ready()
    with stopped(d.process):
        begin = time.monotonic()
        done = run("status", d.address)
        assert done.returncode == 1 and done.stderr.strip()
        assert time.monotonic() - begin < 5         # server_timeout_ms is 1 s
    assert d.status()["pid"] == d.pid


def connect(path):
    end = time.monotonic() + DEADLINE
    while True:
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(DEADLINE)
        try:
            s.connect(str(path))
            return s
        except BlockingIOError:                     # the queue of new connections is full
            s.close()
            assert time.monotonic() < end, "connections are not taken"
            time.sleep(0.02)


def test_strangers_do_no_harm(start, place):
    """Bytes of all kinds, connections that say nothing, and ones that end in the middle of a message."""
    d = start().ready()
    d.status()
    before = d.fds()
    rng = random.Random(3)
    silent = []
    for round_ in range(60):
        s = connect(place / "s")
        try:
            if round_ % 3 == 0:
                silent.append(s)
                continue
            s.sendall(rng.randbytes(rng.choice([1, 7, 8, 9, 100, 5000])) if round_ % 3 == 1
                      else struct.pack("<II", rng.choice([0, 16, 4000, 2**31, 2**32 - 1]), rng.randrange(40)))
        except OSError:
            pass
        if s not in silent:
            s.close()
    assert d.status()["pid"] == d.pid
    for s in silent:
        s.close()
    wait_until(lambda: d.fds() <= before, message="descriptors stay open")
    assert d.stop() == 0


def test_clients_leave_nothing_behind(start):
    d = start().ready()
    d.status()
    before = d.fds()
    threads = len(os.listdir(f"/proc/{d.pid}/task"))
    for _ in range(30):
        d.status()
    wait_until(lambda: d.fds() <= before, message="descriptors stay open")
    wait_until(lambda: len(os.listdir(f"/proc/{d.pid}/task")) <= threads, message="threads stay")


# ---- top ----

def test_top_once(start):
    d = start().ready()
    begin = time.monotonic()
    done = run("top", d.address, "--once", "--interval", "0.3")
    assert done.returncode == 0, done.stderr
    assert 0.3 <= time.monotonic() - begin < 3
    assert f"pid {d.pid}" in done.stdout and "per second" in done.stdout and "\033" not in done.stdout
    assert run("top", d.address, "--interval", "0.1").stdout.count("per second") == 1      # no terminal: once too


@pytest.mark.parametrize("args", [["--interval", "0"], ["--interval", "x"], ["a", "b"], ["--nonsense"]])
def test_top_wrong_usage(args):
    assert run("top", *args).returncode == 2


class Terminal:
    """`flexkv top` in a terminal of 80 x 24."""

    def __init__(self, address, *args):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.seen = b""
        self.process = subprocess.Popen([BIN, "top", address, "--interval", "0.2", *args], stdin=slave, stdout=slave,
                                        stderr=slave, env=clean_env(TERM="xterm"), start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def read(self):
        while select.select([self.master], [], [], 0)[0]:
            try:
                got = os.read(self.master, 65536)
            except OSError:
                return
            if not got:
                return
            self.seen += got

    def wait_for(self, text, within=DEADLINE):
        """Until the text comes, counted from the last call."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            self.read()
            if text in self.seen:
                self.seen = self.seen[self.seen.index(text) + len(text):]
                return
            time.sleep(0.02)
        pytest.fail(f"no {text!r} within {within} s in {self.seen[-2000:]!r}")

    def press(self, keys):
        os.write(self.master, keys)

    def ended(self):
        status = self.process.wait(DEADLINE)
        self.read()
        assert termios.tcgetattr(self.slave) == self.before, "the terminal's settings are not restored"
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    open_ones = []

    def begin(*args):
        open_ones.append(Terminal(*args))
        return open_ones[-1]

    yield begin
    for t in open_ones:
        t.close()


ENTER, LEAVE = b"\033[?1049h", b"\033[?1049l"


@pytest.mark.parametrize("how", ["q", "ctrl-c", signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_top_restores_the_terminal(start, terminal, how):
    d = start().ready()
    t = terminal(d.address)
    t.wait_for(ENTER)
    t.wait_for(b"per second")
    t.wait_for(b"per second")
    if how in ("q", "ctrl-c"):
        t.press(b"q" if how == "q" else b"\003")
    else:
        t.process.send_signal(how)
    t.wait_for(LEAVE, PROMPT)
    assert t.ended() == 0
    assert ENTER not in t.seen


def test_top_lines_fit_the_terminal(start, terminal):
    d = start().ready()
    t = terminal(d.address)
    t.wait_for(b"per second")
    fcntl.ioctl(t.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 30, 0, 0))
    t.process.send_signal(signal.SIGWINCH)
    t.wait_for(b"\033[J")
    t.wait_for(b"\033[J")
    t.seen = b""
    t.wait_for(b"\033[H")
    wait_until(lambda: t.read() or b"\033[J" in t.seen)
    frame = re.sub(rb"\033\[[0-9;?]*[a-zA-Z]", b"", t.seen[:t.seen.index(b"\033[J")]).replace(b"\r", b"").split(b"\n")
    assert len(frame) <= 5 and max(map(len, frame)) <= 30


def test_top_goes_on_when_the_daemon_is_back(start, terminal):
    first = start().ready()
    t = terminal(first.address)
    t.wait_for(b"pid %d" % first.pid)
    first.process.kill()
    first.wait()
    t.wait_for(b"no answer since")
    second = start().ready()
    t.wait_for(b"pid %d" % second.pid)
    with stopped(second.process):
        t.wait_for(b"no answer since")
    t.wait_for(b"\033[J")
    wait_until(lambda: (t.read(), b"no answer" not in t.seen.rsplit(b"\033[H", 2)[-1])[1])
    t.press(b"q")
    assert t.ended() == 0
    assert second.stop() == 0
