"""vLLM's HTTP server with FlexKV: two data-parallel replicas that share a daemon, metrics, reset from
outside, and what is left when the server is told to go; engines that share a daemon."""
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

from vllm_plans import (Failed, basics, cached, connector, environment, finish, model, run,
                        same_tokens, start, stop, tail)
from vllm_run import token_ids

from flexkv.program import find_program

START = 420
STOP = 60


def flexkv_status(address: str) -> dict[str, Any] | None:
    done = subprocess.run([find_program(), "status", "--json", address], capture_output=True,
                          timeout=30)
    return json.loads(done.stdout) if done.returncode == 0 else None


def end_daemon(address: str) -> None:
    """One that an engine started, which stays for a minute."""
    status = flexkv_status(address)
    if status:
        os.kill(status["pid"], signal.SIGTERM)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    address = f"ipc://{tmp_path}/node"
    yield address
    end_daemon(address)


class Server:
    def __init__(self, folder: Path, arguments: list[str], **env: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder = folder
        with open(folder / "server.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
                 "--port", str(self.port), "--served-model-name", "tiny", "--dtype", "float32",
                 "--enforce-eager", "--skip-tokenizer-init", "--gpu-memory-utilization", "0.4",
                 "--enable-prompt-tokens-details", *arguments],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
                env=environment(**env))
        end = time.monotonic() + START
        while not self.alive():
            if self.process.poll() is not None or time.monotonic() > end:
                stop(self.process)
                raise Failed("the server did not start; " + tail(folder, "server"))
            time.sleep(0.5)

    def alive(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None,
                               {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def complete(self, prompt: list[int], replica: int) -> tuple[list[int], int]:
        """The tokens said, and how many of the prompt came from caches."""
        status, body = self.ask("POST", "/v1/completions", {
            "model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "detokenize": False,
        }, **{"X-data-parallel-rank": str(replica)})
        assert status == 200, body
        answer = json.loads(body)
        details = answer["usage"].get("prompt_tokens_details") or {}
        return answer["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for line in self.ask("GET", "/metrics")[1].decode().splitlines():
            if line.startswith("vllm:flexkv_"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0].removeprefix("vllm:flexkv_")
                found[name] = found.get(name, 0) + float(value)
        return found

    def end(self) -> None:
        """As a supervisor does it; nothing of the process group may be left."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(STOP)
        end = time.monotonic() + STOP
        while True:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            assert time.monotonic() < end, "processes of the engine are left"
            time.sleep(0.2)


def test_replicas_share_a_daemon(tmp_path: Path, address: str) -> None:
    """What one replica computed, the other loads. The daemon is started by one of them."""
    tiny = model(tmp_path, "gqa")
    server = Server(tmp_path, [
        "--model", tiny["model"], "--block-size", "32", "--max-model-len", "4096",
        "--data-parallel-size", "2", "--kv-transfer-config",
        json.dumps(connector("ours")["kv_transfer_config"])],
        FLEXKV_SERVER_RECV_PORT=address, VLLM_SERVER_DEV_MODE="1", OMP_NUM_THREADS="1")
    try:
        prompt = token_ids(1, 1000)
        first = server.complete(prompt, 0)
        assert first[1] == 0
        second = server.complete(prompt, 1)
        assert second == (first[0], 992)
        third = server.complete(prompt + token_ids(2, 200), 1)
        assert third[1] >= 992
        assert server.complete(prompt + token_ids(2, 200), 0)[0] == third[0]
        time.sleep(1)
        metrics = server.metrics()
        assert metrics["hit_cpu_tokens_total"] >= 992 and metrics["loads_total"] >= 1
        assert metrics["failed_loads_total"] == 0

        status, body = server.ask("POST", "/reset_prefix_cache?reset_external=true")
        assert status == 200 and json.loads(body) == {"success": True}
        assert server.complete(prompt, 1) == (first[0], 0), "the reset did not reach FlexKV"
    finally:
        try:
            server.end()
        finally:
            stop(server.process)
    status = flexkv_status(address)
    assert status is not None, "the daemon went with the engine that started it"


def test_engines_share_a_daemon(tmp_path: Path, address: str) -> None:
    """One after the other, with both connectors; then two at once; nothing but a missing daemon's
    address in common."""
    env = {"FLEXKV_SERVER_RECV_PORT": address, "FLEXKV_SERVER_CLIENT_MODE": "1"}
    arguments = model(tmp_path, "gqa")
    expected = run(tmp_path, "alone", arguments, basics())
    first = run(tmp_path, "first", arguments | connector("ours"), basics(), **env)
    same_tokens(expected, first)
    second = run(tmp_path, "second", arguments | connector("upstream"), basics(), **env)
    same_tokens(expected, second)
    assert cached(second, "cold") == cached(first, "hit"), "nothing of the first one was found"
    both = {name: start(tmp_path, name, arguments | connector(kind), basics(), OMP_NUM_THREADS="1",
                        **env)
            for name, kind in (("third", "ours"), ("fourth", "upstream"))}
    try:
        for name, process in both.items():
            same_tokens(expected, finish(process, tmp_path, name))
    finally:
        for process in both.values():
            stop(process)


def test_address_in_use(tmp_path: Path) -> None:
    """Two engines with a node of their own at one address: the second is told at once."""
    address = f"ipc://{tmp_path}/node"
    arguments = model(tmp_path, "gqa") | connector("ours")
    steps = [["generate", "one", [[[1, 40]]], 2], ["settle", 90]]
    first = start(tmp_path, "first", arguments, steps, FLEXKV_SERVER_RECV_PORT=address)
    try:
        end = time.monotonic() + START
        while not (tmp_path / "node").exists():
            assert first.poll() is None and time.monotonic() < end, tail(tmp_path, "first")
            time.sleep(0.5)
        with pytest.raises(Failed) as e:
            run(tmp_path, "second", arguments, steps, FLEXKV_SERVER_RECV_PORT=address)
        assert address in str(e.value) or address in (tmp_path / "second.log").read_text()
    finally:
        stop(first)


def test_no_daemon(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/nobody"
    with pytest.raises(Failed):
        run(tmp_path, "engine", model(tmp_path, "gqa") | connector("ours"), [],
            FLEXKV_SERVER_RECV_PORT=address, FLEXKV_SERVER_CLIENT_MODE="1",
            FLEXKV_SERVER_LAUNCH_MODE="external")
    text = (tmp_path / "engine.log").read_text()
    assert f"no FlexKV daemon answers at {address}" in text
    assert "FLEXKV_SERVER_LAUNCH_MODE" in text


def test_switched_off(tmp_path: Path) -> None:
    arguments = model(tmp_path, "gqa") | connector("ours")
    steps = [["generate", "one", [[[1, 300]]], 4], ["reset", False],
             ["generate", "two", [[[1, 300]]], 4]]
    result = run(tmp_path, "engine", arguments, steps, ENABLE_FLEXKV="0")
    assert cached(result, "two") == [0]
    assert result["one"][0]["tokens"] == result["two"][0]["tokens"]
    assert "caching is off" in (tmp_path / "engine.log").read_text()
