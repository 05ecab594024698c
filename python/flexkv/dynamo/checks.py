"""What a worker is about to use, looked at before it starts: sockets, ports and directories that
another one has already would show a minute later, deep in the engine's log, or not at all (two
workers that publish at one port are both taken for nobody).

What is free is held by name until the worker ends, so that of two workers started at once the
second one is told. The names are sockets in the abstract namespace: they go with the process.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from flexkv._flexkv import Config, Error
from flexkv.integration.vllm import settings

from .command import Command, EVENTS

ADDRESS = "FLEXKV_SERVER_RECV_PORT"
SSD = "FLEXKV_SSD_CACHE_DIR"


class Taken(Exception):
    """Something can't be had; the text names the setting."""


def check(command: Command) -> list[socket.socket]:
    """What is held from now on. Fills in an event endpoint where none was given."""
    config = Config()
    config.load_default()
    held: list[socket.socket] = []
    shared = settings.shared(config) or command.replicas > 1
    if settings.true(config.get("enable_flexkv")) and not shared:
        _address(config.get("server_recv_port"), held)
        if config.get("ssd_cache_gb") not in ("", "0"):
            for folder in config.get("ssd_cache_dir").split(";"):
                _folder(Path(folder.strip()), held)
    _events(command, _option(config, "kv_events_endpoint"), held)
    return held


def _option(config: Config, key: str) -> str:
    """"" also where this build has no such option."""
    try:
        return config.get(key)
    except Error:
        return ""


# ---- the node's address ------------------------------------------------------------------------

def _address(address: str, held: list[socket.socket]) -> None:
    if not settings.address_given(address) or not address.startswith("ipc://"):
        return
    name = address.removeprefix("ipc://")
    if not name.startswith("@"):
        path = Path(name)
        if not os.access(path.parent, os.W_OK):
            raise Taken(f"{ADDRESS}={address}: {path.parent} is no directory that can be written to")
        if len(os.fsencode(name)) > 107:
            raise Taken(f"{ADDRESS}={address}: a socket's path has at most 107 bytes")
        name = str(path.resolve())
    with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
        s.settimeout(2)
        s.connect("\0" + name[1:] if name.startswith("@") else name)
        raise Taken(f"{ADDRESS}={address}: another FlexKV node listens there{_peer(s)}; give each "
                    "worker an address of its own, or let them share a daemon with FLEXKV_SERVER_CLIENT_MODE=1")
    _hold("address " + name, f"{ADDRESS}={address}: another worker was started with it; give each "
          "its own", held)


def _peer(s: socket.socket) -> str:
    with contextlib.suppress(OSError):
        pid = int.from_bytes(s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        return f" ({_process(pid)})"
    return ""


# ---- the SSD directories -----------------------------------------------------------------------

def _folder(folder: Path, held: list[socket.socket]) -> None:
    place = folder.resolve()
    there = place
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise Taken(f"{SSD}={folder}: {there} is no directory that can be written to")
    with contextlib.suppress(FileNotFoundError), open(place / "flexkv.lock", "rb+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                raise Taken(f"{SSD}={folder}: {e.strerror}") from None
            raise Taken(f"{SSD}={folder} is in use by {_process(_number(lock.read(24)))}; give each "
                        "worker a directory of its own") from None
    _hold(f"directory {place}", f"{SSD}={folder}: another worker was started with it; give each "
          "a directory of its own", held)


# ---- the engine's KV events --------------------------------------------------------------------

def _events(command: Command, own: str, held: list[socket.socket]) -> None:
    """own: where FlexKV's node publishes itself, for others than this worker's relay."""
    events = command.events
    used: dict[int, str] = {}
    if own.startswith("tcp://"):
        _port(own, 0, f"FLEXKV_KV_EVENTS_ENDPOINT={own}", used, held)
    if events is None:
        port = _free_ports(command.ranks)
        command.arguments += [EVENTS, '{"publisher":"zmq","enable_kv_cache_events":true,'
                              f'"endpoint":"tcp://*:{port - command.first_rank}"}}']
        return
    if not events.get("enable_kv_cache_events"):
        print(f'flexkv.dynamo: {EVENTS} without "enable_kv_cache_events":true: the router will know nothing '
              "of what this worker has")
        return
    for name in ("endpoint", "replay_endpoint"):
        endpoint = events.get(name)
        if endpoint and endpoint.startswith("tcp://"):
            setting = f"{EVENTS}: {name} {endpoint}"
            for rank in range(command.first_rank, command.first_rank + command.ranks):
                _port(endpoint, rank, setting, used, held)


def _port(endpoint: str, rank: int, setting: str, used: dict[int, str],
          held: list[socket.socket]) -> None:
    """Each data-parallel rank adds its number to the port."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "*", (parts.port or 0) + rank
        if not parts.port or port > 65535:
            raise ValueError("no port")
    except ValueError:
        raise Taken(f"{setting}: no tcp://HOST:PORT; HOST may be *") from None
    if port in used:
        raise Taken(f"{setting}: port {port} is also one of {used[port]}; ranks count up from each, so "
                    "leave as many ports between the two as there are ranks")
    used[port] = setting
    _hold(f"port {port}", f"{setting}: another worker was started with port {port}; give each its own, "
          "as two publishers at one port take each other's blocks from the router", held)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # as ZMQ does
        try:
            s.bind(("" if host == "*" else host, port))
            s.listen(1)
        except OSError as e:
            who = _listener(port) if e.errno == errno.EADDRINUSE else ""
            raise Taken(f"{setting}: port {port}: {e.strerror}{who}") from None


def _free_ports(count: int) -> int:
    """The first of so many in a row. Dynamo and the engine hear of it by the same argument."""
    for _ in range(50):
        with contextlib.ExitStack() as stack:
            first = 0
            try:
                for i in range(count):
                    s = stack.enter_context(socket.socket())
                    s.bind(("", first + i if first else 0))
                    first = first or s.getsockname()[1]
            except (OSError, OverflowError):
                continue
            return first
    raise Taken(f"no {count} free ports in a row: give {EVENTS} an endpoint")


# ---- names and processes -----------------------------------------------------------------------

def _hold(resource: str, trouble: str, held: list[socket.socket]) -> None:
    """resource may be longer than a socket's name."""
    s = socket.socket(socket.AF_UNIX)
    try:
        s.bind("\0flexkv-dynamo-" + hashlib.sha256(resource.encode()).hexdigest()[:32])
    except OSError as e:
        s.close()
        if e.errno != errno.EADDRINUSE:
            raise
        raise Taken(trouble) from None
    held.append(s)


def _number(text: bytes) -> int:
    try:
        return int(text.split()[0])
    except (ValueError, IndexError):
        return 0


def _process(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        words = ""
    return f"process {pid}" + (f": {words.strip()[:80]}" if words else "")


def _listener(port: int) -> str:
    """Whose port it is, as far as that may be seen. Engines whose main process was killed go on
    without it and keep their ports."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{words[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd) in sockets for fd in (process / "fd").iterdir()):
                return f", by {_process(int(process.name))}"
    return ""
