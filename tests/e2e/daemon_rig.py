"""What the tests of the daemon share: the program, a daemon in the background that never outlives its test,
waiting with a deadline."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = os.environ.get("FLEXKV_BIN", str(ROOT / "build" / "flexkv"))
DEADLINE = 20           # of anything that must happen
PROMPT = 2              # of a signal: seen within 1 s, and nothing to wait for


def clean_env(**more):
    """Ours without what the caller's environment may say about FlexKV."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FLEXKV_", "NOTIFY_"))}
    return {**env, **more}


def run(*args, env=None, timeout=DEADLINE):
    return subprocess.run([BIN, *map(str, args)], capture_output=True, text=True, timeout=timeout,
                          env=clean_env(**(env or {})), stdin=subprocess.DEVNULL)


def wait_until(what, *, within=DEADLINE, message="it did not happen"):
    """A message that is a function is asked for when the time is over, and says what is so then."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.02)
    pytest.fail(f"{message() if callable(message) else message} within {within} s")


def states(pid):
    """Of the process's threads, as /proc has them; those that end meanwhile have none."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield stat.read_text().rpartition(")")[2].split()[0]


def stop(process):
    """SIGSTOP, and it has stopped, with all its threads: the signal alone takes its time."""
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: set(states(process.pid)) == {"T"}, message="the process does not stop")


@contextlib.contextmanager
def stopped(process):
    """It stands still within."""
    try:
        stop(process)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


class Daemon:
    """A `flexkv serve` in the background, with a log in a file and a service manager that listens."""

    def __init__(self, place, address, *args, env=None, name="daemon"):
        self.address = address
        self.log_path = place / f"{name}.log"
        self.notify_path = place / f"{name}.notify"
        self.notify_path.unlink(missing_ok=True)
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(self.notify_path))
        self.notify.settimeout(DEADLINE)
        command = [BIN, "serve", "--set", "cpu_cache_gb=4M"]
        command += ["--address", address] if address else []
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen([*command, *map(str, args)], stderr=log, stdin=subprocess.DEVNULL,
                                            cwd=place, env=clean_env(NOTIFY_SOCKET=str(self.notify_path), **(env or {})))

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        return self.log_path.read_text(errors="replace")

    def told(self):
        """The next message to the service manager."""
        try:
            return self.notify.recv(4096).decode()
        except TimeoutError:
            pytest.fail(f"the service manager heard nothing; log: {self.log()}")

    def ready(self):
        assert self.told().startswith("READY=1"), self.log()
        return self

    def wait(self, within=DEADLINE):
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the daemon still runs after {within} s; log: {self.log()}")

    def stop(self, sig=signal.SIGTERM, within=PROMPT):
        self.process.send_signal(sig)
        return self.wait(within)

    def status(self):
        done = run("status", "--json", self.address)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)
        self.notify.close()
        self.notify_path.unlink(missing_ok=True)


@pytest.fixture
def place():
    base = Path(tempfile.mkdtemp(prefix="fkd-"))        # short: a socket's path has 107 bytes
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def start(place):
    daemons = []

    def begin(*args, address=f"ipc://{place}/s", **kw):
        daemons.append(Daemon(place, address, *args, name=f"d{len(daemons)}", **kw))
        return daemons[-1]

    yield begin
    for d in daemons:
        d.end()


@pytest.fixture
def world(tmp_path):
    """Makes processes in a private folder; whatever of them is left in the end is killed."""
    things = []

    def make(kind, *args, **kw):
        thing = kind(tmp_path, *args, **kw)
        things.append(thing)
        return thing

    yield make
    for thing in reversed(things):
        thing.kill()
