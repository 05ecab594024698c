"""A real vLLM server for the demo: started, asked and stopped, every wait with a deadline.

    python demo_server.py GROUP     kills what is left of the process group GROUP
"""
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

START_SECONDS = 300
REQUEST_SECONDS = 120
STOP_SECONDS = 30
KILL_SECONDS = 10

FLEXKV = {
    "kv_connector": "FlexKVConnectorV1",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


class DemoError(Exception):
    """What the demo shows instead of a traceback."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One run of the engine; a context manager. `extra` goes to the environment."""

    def __init__(self, python: str, model: Path, work: Path, log: Path, flexkv: bool,
                 extra: dict[str, str]) -> None:
        self.log = log
        self.port = free_port()
        args = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(self.port),
                # float32: other types round differently for other batch shapes, so that equal
                # KV may give other tokens.
                "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192",
                "--max-num-batched-tokens", "8192", "--block-size", "32",
                "--enable-prompt-tokens-details"]
        if flexkv:
            args += ["--kv-transfer-config", json.dumps(FLEXKV)]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(args, cwd=work, env=environment(work, extra), stdout=out,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                            start_new_session=True)
        # tools/demo kills this group, should we be gone before we could.
        self.group = work / "group"
        self.group.write_text(f"{self.process.pid}\n")

    def __enter__(self) -> "Server":
        try:
            self.wait_until_up()
        except BaseException:
            self.stop(0)        # an engine that is about to start does not always hear SIGTERM
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop(0 if kind else STOP_SECONDS)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise DemoError(f"the engine ended with status {self.process.returncode}\n{self.tail()}")
            try:
                if self.request("GET", "/health", seconds=5)[0] == 200:
                    return
            except DemoError:
                pass
            time.sleep(0.2)
        raise DemoError(f"the engine was not up after {START_SECONDS} s\n{self.tail()}")

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join("  | " + line for line in lines[-40:]) + f"\n  (from {self.log})"

    def stop(self, patience: float) -> None:
        self.process.terminate()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        end_group(self.process.pid)
        self.process.wait(KILL_SECONDS)
        self.group.unlink(missing_ok=True)

    def connection(self, seconds: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def request(self, method: str, path: str, seconds: float = REQUEST_SECONDS) -> tuple[int, bytes]:
        c = self.connection(seconds)
        try:
            c.request(method, path)
            answer = c.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as e:
            raise DemoError(f"the engine does not answer {path}: {e}\n{self.tail()}") from e
        finally:
            c.close()

    def complete(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """The answer to a prompt, greedy, and the seconds until its first token was here."""
        body = json.dumps({"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                           "ignore_eos": True, "stream": True, "return_token_ids": True})
        answer: list[int] = []
        first = 0.0
        c = self.connection(REQUEST_SECONDS)
        try:
            start = time.monotonic()
            c.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            reply = c.getresponse()
            if reply.status != 200:
                raise DemoError(f"the engine refused a request: {reply.read(500)!r}")
            for event in events(reply, start + REQUEST_SECONDS):
                first = first or time.monotonic() - start
                for choice in event.get("choices", []):
                    answer += choice.get("token_ids") or []
        except (OSError, http.client.HTTPException) as e:
            raise DemoError(f"the engine broke off an answer: {e}\n{self.tail()}") from e
        finally:
            c.close()
        if len(answer) != tokens:
            raise DemoError(f"the engine gave {len(answer)} tokens of {tokens}\n{self.tail()}")
        return answer, first

    def reset_prefix_cache(self) -> None:
        """Empties the engine's own prefix cache. It refuses while a transfer holds blocks."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            status, body = self.request("POST", "/reset_prefix_cache")
            if status != 200:
                raise DemoError(f"/reset_prefix_cache: status {status}")
            if json.loads(body)["success"]:
                return
            time.sleep(0.02)
        raise DemoError("the engine's prefix cache could not be reset for 20 s: a transfer does not end")

    def metrics(self) -> dict[str, float]:
        """Everything at /metrics: 'name{labels}' -> value."""
        text = self.request("GET", "/metrics")[1].decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^([a-z_:]\S*(?:\{.*\})?) (\S+)$", text, re.M)}


def members(group: int) -> dict[int, bool]:
    """The processes of a group. True: one of Python's resource trackers, which end by themselves
    when the others have, and remove shared memory that those have left."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found[int(process.name)] = b"resource_tracker" in (process / "cmdline").read_bytes()
        except (OSError, ValueError):
            pass                        # it has ended meanwhile
    return found


def end_group(group: int) -> None:
    """Kills what is left of an engine's processes."""
    deadline = time.monotonic() + KILL_SECONDS
    while left := members(group):
        late = time.monotonic() > deadline
        for pid, tracker in left.items():
            if late or not tracker:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if late:
            return
        time.sleep(0.02)


def environment(work: Path, extra: dict[str, str]) -> dict[str, str]:
    """The user's environment, with everything that the engine writes below `work`."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "FLEXKV_"))}
    threads = len(os.sched_getaffinity(0))
    return mine | {
        "HOME": str(work), "XDG_CACHE_HOME": str(work / "cache"), "XDG_CONFIG_HOME": str(work / "config"),
        "TMPDIR": str(work), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(min(threads, 16)), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1", "TOKENIZERS_PARALLELISM": "false",
    } | extra


def events(reply: IO[bytes], deadline: float) -> Iterator[dict[str, Any]]:
    """Server-sent events until [DONE]."""
    while line := reply.readline():
        if time.monotonic() > deadline:
            raise DemoError(f"an answer took more than {REQUEST_SECONDS} s")
        if line.startswith(b"data: "):
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


if __name__ == "__main__":
    end_group(int(sys.argv[1]))
