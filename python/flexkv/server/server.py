"""The daemon that an engine starts for itself and others: `flexkv serve`.

It belongs to nobody: a session of its own, and it ends by itself once its last client has gone.
"""
from __future__ import annotations

import os
import subprocess
from typing import Any

from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig
from flexkv.common.debug import flexkv_logger
from flexkv.common.node_config import node_settings
from flexkv.program import find_program

_IDLE_S = 2                     # how long the daemon outlives its last client
_SECRETS = {"redis_password": "FLEXKV_REDIS_PASSWORD"}      # never on a command line


class KVServerHandle:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def shutdown(self) -> None:
        """Waits for the daemon's end, unless others still use it."""
        try:
            self.process.wait(_IDLE_S + 1)
        except subprocess.TimeoutExpired:
            flexkv_logger.info("the daemon (pid %d) goes on: it has other clients",
                               self.process.pid)


class KVServer:
    @classmethod
    def create_server(cls, model_config: ModelConfig, cache_config: CacheConfig,
                      gpu_register_port: str | None = None, server_recv_port: str | None = None,
                      child_env: dict[str, str] | None = None,
                      inherit_env: bool = True) -> KVServerHandle:
        """Starts a daemon. One that answers at the address already is left in place: the new
        one ends, and clients find the old one."""
        address = server_recv_port or GLOBAL_CONFIG_FROM_ENV.server_recv_port
        env = dict(os.environ) if inherit_env else {
            name: value for name, value in os.environ.items() if name.startswith("FLEXKV_")
            or name in ("PATH", "HOME", "LD_LIBRARY_PATH")}
        env.update(child_env or {})
        command: list[Any] = [find_program(), "serve", "--address", address,
                              "--exit-when-idle", str(_IDLE_S)]
        for key, value in node_settings(model_config, cache_config).items():
            if key in _SECRETS:
                env[_SECRETS[key]] = value
            else:
                command += ["--set", f"{key}={value}"]
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
        flexkv_logger.info("started a daemon for %s (pid %d)", address, process.pid)
        return KVServerHandle(process)
