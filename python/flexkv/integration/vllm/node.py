"""The node behind the scheduler's side: opened in this process, or served by a daemon, which
is started here if there is none yet."""
from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from flexkv._flexkv import Config, Error, Node

from .settings import Settings

logger = logging.getLogger("vllm.flexkv")

# A daemon that this engine started goes when it has had no client for so long: time enough for an
# engine to be restarted and find its blocks in memory.
IDLE_SECONDS = 60
_RETRY_SECONDS = 0.1
_NOBODY = (errno.ECONNREFUSED, errno.ENOENT)


def open_node(settings: Settings, spaces: int) -> Node:
    """spaces: how many this engine needs."""
    if settings.client:
        return _connect(settings, spaces)
    config = Config()
    config.load_default()
    if settings.max_spaces < spaces:
        config.set("max_spaces", str(spaces))
    node = Node.open(config)
    try:
        node.listen(settings.address)
    except Error:
        node.close()
        raise
    logger.info("FlexKV: node opened in this process, workers meet at %s", settings.address)
    return node


def _connect(settings: Settings, spaces: int) -> Node:
    """Every engine tries to start the daemon if nobody answers. All but one of them lose the
    address, exit and say so; their engines find the winner here."""
    config = Config()
    config.load_default()
    deadline = time.monotonic() + settings.start_timeout
    daemon: subprocess.Popen[bytes] | None = None
    while True:
        try:
            node = Node.connect(settings.address, config)
            logger.info("FlexKV: connected to the daemon at %s", settings.address)
            return node
        except Error as e:
            if e.errno not in _NOBODY and e.errno != errno.ETIMEDOUT:
                raise
            if not settings.launch:
                raise Error(e.errno, f"no FlexKV daemon answers at {settings.address}: start one "
                            f"with: flexkv serve --address {settings.address}, or let the engine "
                            "start it with FLEXKV_SERVER_LAUNCH_MODE=embedded") from e
            if time.monotonic() > deadline:
                raise Error(e.errno, f"no FlexKV daemon answers at {settings.address} after "
                            f"{settings.start_timeout:.0f} s{_fate(daemon)} "
                            "(FLEXKV_SERVER_RECV_PORT, FLEXKV_WORKER_TIMEOUT_MS)") from e
        if daemon is None:
            daemon = _start_daemon(settings, spaces)
        time.sleep(_RETRY_SECONDS)


def _start_daemon(settings: Settings, spaces: int) -> subprocess.Popen[bytes]:
    """Out of the engine's process group, so that it outlives the engine that happened to start
    it: others may be using it."""
    program = find_program()
    command = [program, "serve", "--address", settings.address,
               "--exit-when-idle", str(IDLE_SECONDS)]
    if settings.max_spaces < spaces:
        command += ["--set", f"max_spaces={spaces}"]
    logger.info("FlexKV: nobody answers at %s, starting %s", settings.address, " ".join(command))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _fate(daemon: subprocess.Popen[bytes] | None) -> str:
    if daemon is None:
        return ""
    code = daemon.poll()
    if code is None:
        return f"; the one started here (process {daemon.pid}) still runs"
    return f"; the one started here ended with status {code}, see its message above"


def find_program() -> str:
    """The flexkv program: that of this environment before any other."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        program = folder / "flexkv"
        if os.access(program, os.X_OK):
            return str(program)
    program = shutil.which("flexkv")
    if program:
        return program
    raise FileNotFoundError(
        "the flexkv program is neither beside this Python nor in PATH, so no daemon can be "
        "started. Install it, or start a daemon elsewhere and set "
        "FLEXKV_SERVER_LAUNCH_MODE=external")
