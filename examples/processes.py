"""Processes of the examples: started with a mark in their environment, found by it again whoever's child they are, ended with
all that they started. Also ports, and signals that end a script as an exception does; and what deployments of several
processes have in common.

Used by dynamo/ and multi_node/ beside it. Standard library only.
"""
from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KILL_SECONDS = 10
STOP_SECONDS = 30
MARK = "EXAMPLE_FOLDER_OF_FLEXKV"    # in the environment of all that is started: how it is found again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Trouble(Exception):
    """What is shown instead of a traceback."""


@dataclass
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 25) -> str:
        """The end of its log, and what looks like the reason, without our own looks at its health."""
        text = [line for line in plain(self.log).splitlines() if "response failed" not in line]
        why = [line for line in text[:-lines] if re.match(r"\w*(Error|Exception): ", line)][:3]
        return "\n".join("  | " + line for line in why + text[-lines:]) + f"\n  (from {self.log})"

    def alive(self) -> None:
        if self.process.poll() is not None:
            raise Trouble(f"{self.name} ended with status {self.process.returncode}\n{self.tail()}")


def plain(log: Path) -> str:
    """Without the colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives out by itself, so that nobody has one by chance before it
    is used; Dynamo's own numbers for DYN_SYSTEM_PORT end at 32767, too."""
    ports: list[int] = []
    for port in random.sample(range(20000, 32000), 12000):
        if len(ports) == count:
            break
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            ports.append(port)
    return ports


def listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def _processes() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid():
            yield process


def marked(folder: Path) -> set[int]:
    """Everything that was started for deployments in or below this folder, whoever's child it is
    now."""
    mark = re.compile(rb"(?:^|\0)" + re.escape(f"{MARK}={folder}".encode()) + rb"[/\0]")
    found = set()
    for process in _processes():
        with contextlib.suppress(OSError):
            if mark.search((process / "environ").read_bytes() + b"\0") and _runs(process):
                found.add(int(process.name))
    return found


def group_members(group: int) -> set[int]:
    found = set()
    for process in _processes():
        with contextlib.suppress(OSError, ValueError):
            if int(_stat(process)[2]) == group and _runs(process):
                found.add(int(process.name))
    return found


def _stat(process: Path) -> list[str]:
    return (process / "stat").read_text().rpartition(")")[2].split()


def _runs(process: Path) -> bool:
    """A killed process's first thread may be gone while others still have its files and sockets."""
    return _stat(process)[0] != "Z" or len(list((process / "task").iterdir())) > 1


def end_marked(folder: Path) -> None:
    end_processes(lambda: marked(folder))


def end_processes(find: Any) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while (left := find()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def stop_children(children: list[Child], patience: float) -> None:
    """SIGTERM, and SIGKILL for who takes longer than that; without patience at once."""
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGTERM if patience else signal.SIGKILL)
    deadline = time.monotonic() + patience
    for child in children:
        try:
            child.process.wait(max(deadline - time.monotonic(), 0.1 if patience else KILL_SECONDS))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait(KILL_SECONDS)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal ends what is going on as an exception does, so that everything is stopped."""
    def end(number: int, _: object) -> None:
        for s in SIGNALS:
            signal.signal(s, signal.SIG_IGN)    # once is enough
        raise SystemExit(128 + number)

    before = {s: signal.signal(s, end) for s in SIGNALS}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Processes:
    """Processes that belong together, as a context manager: `start` starts them, `stop` ends them. The folder must be empty; it is
    the caller's to remove."""

    NOT_THEIRS: tuple[str, ...] = ("VLLM_", "FLEXKV_", "DYNAMO_")       # the user's settings that they do not see

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder, self.python = folder, python
        self.children: list[Child] = []

    def __enter__(self) -> Any:
        try:
            self.start()
        except BaseException:
            self.stop(0)
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop(0 if kind else STOP_SECONDS)

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, patience: float) -> None:
        raise NotImplementedError

    def spawn(self, name: str, command: list[Any], extra: dict[str, str] | None = None, *, talks: bool = False) -> Child:
        """talks: its standard input and output are ours, and the log has what it says beside that."""
        log = self.folder / f"{name}.log"
        with open(log, "ab") as out:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment(extra or {}),
                                       stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                                       stdout=subprocess.PIPE if talks else out, stderr=out, start_new_session=True)
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        """The user's, with everything that is written below the folder."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(self.NOT_THEIRS)}
        for name in ("home", "cache"):
            (self.folder / name).mkdir(exist_ok=True)
        return mine | {
            MARK: str(self.folder), "HOME": str(self.folder / "home"), "TMPDIR": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
        } | extra

    def wait(self, what: str, seconds: float, ready: Callable[[], Any], pause: float = 0.2) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            for child in self.children:
                child.alive()
            if time.monotonic() > deadline:
                raise Trouble(f"{what}: not ready after {seconds:.0f} s\n{self.last().tail()}")
            time.sleep(pause)

    def last(self) -> Child:
        """Whose log says most about a wait that was in vain."""
        return self.children[-1]

    def write_model(self) -> None:
        """A small one with random weights, in the folder."""
        done = subprocess.run([self.python, ROOT / "tests/engine/tiny_model.py", "bytes", self.folder / "model"],
                              capture_output=True, timeout=60)
        if done.returncode:
            raise Trouble(f"the model could not be written: {done.stderr.decode(errors='replace')}")
