"""The node behind the scheduler's side: opened in this process, or served by a daemon, which
is started here if there is none yet."""
from __future__ import annotations

import errno
import logging
import subprocess
import time
from pathlib import Path

from flexkv._flexkv import Config, Error, Node
from flexkv.program import find_program

from .settings import Settings

logger = logging.getLogger("vllm.flexkv")

# A daemon that this engine started goes when it has had no client for so long: time enough for an
# engine to be restarted and find its blocks in memory.
IDLE_SECONDS = 60
_RETRY_SECONDS = 0.1
_WINNER_SECONDS = 10    # in which another engine's daemon must answer once ours has ended
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
    daemon, lost = 0, False
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
                raise Error(e.errno, f"no FlexKV daemon answers at {settings.address}"
                            f"{_fate(daemon)} (FLEXKV_SERVER_RECV_PORT, FLEXKV_WORKER_TIMEOUT_MS)") from e
        if not daemon:
            daemon = _start_daemon(settings, spaces)
        elif not lost and not _runs(daemon):
            lost = True
            deadline = min(deadline, time.monotonic() + _WINNER_SECONDS)
        time.sleep(_RETRY_SECONDS)


def _start_daemon(settings: Settings, spaces: int) -> int:
    """Out of the engine's process group and no child of its: other engines may be using it when
    this one ends, and vLLM kills all its descendants then. Returns the process number."""
    command = [find_program(), "serve", "--address", settings.address,
               "--exit-when-idle", str(IDLE_SECONDS)]
    if settings.max_spaces < spaces:
        command += ["--set", f"max_spaces={spaces}"]
    logger.info("FlexKV: nobody answers at %s, starting %s", settings.address, " ".join(command))
    shell = subprocess.run(["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *command],
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
                           start_new_session=True, timeout=settings.start_timeout)
    return int(shell.stdout)


def _runs(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _fate(daemon: int) -> str:
    if not daemon:
        return ""
    if _runs(daemon):
        return f"; the one started here (process {daemon}) still runs"
    return f"; the one started here (process {daemon}) has ended, see its message above"
