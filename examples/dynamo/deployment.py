"""A deployment of NVIDIA Dynamo on this machine: what its workers and router meet by, the front end
with the KV router, and workers with FlexKV; started, asked and stopped, every wait with a deadline.

Used by demo.py and bench.py beside it and by tests/dynamo. Runs with the python that
tools/dynamo-env --vllm prints, which has everything that is started here.

    python deployment.py FOLDER     ends what was left of a deployment in or below the folder

Two forms:
  etcd   nats-server -js and etcd, as in a cluster; requests and events by the planes that are named
  file   a folder and ZMQ: no server besides Dynamo's own processes
"""
from __future__ import annotations

import http.client
import json
import re
import shutil
import sys
import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import (STOP_SECONDS, Child, Processes, Trouble, end_marked, end_processes,  # noqa: E402, F401
                       ended_by_signals, free_ports, group_members, listens, marked, plain, stop_children)

START_SECONDS = 300
REQUEST_SECONDS = 120
MODEL = "tiny"
BLOCK = 32                          # tokens; vLLM's CPU attention takes multiples of it


@dataclass
class Options:
    form: str = "etcd"
    planes: str = ""                # "nats": requests and events by NATS; "": Dynamo's defaults
    workers: int = 4
    router: str = "kv"
    flexkv: bool = True
    own_connectors: Container[int] = ()     # workers with FlexKV's own connector class
    events: bool = True             # of the engine and of FlexKV
    flexkv_events: bool = True
    cpu_cache: str = "256M"
    ssd_cache: str = "512M"
    engine_blocks: int = 0          # the engine's own KV blocks; 0: what fits into 1 GiB
    max_length: int = 8192
    worker_arguments: list[str] = field(default_factory=list)
    worker_environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """What came back for one request, and what the router says about it."""
    text: str
    worker: int
    hit_rate: float                 # share of the prompt's blocks that the router gave credit for
    cached_tokens: int              # that the engine had, or loaded
    body: dict[str, Any]


class Deployment(Processes):
    NOT_THEIRS = (*Processes.NOT_THEIRS, "DYN_", "NATS_", "ETCD_")

    def __init__(self, folder: Path, options: Options, python: str = sys.executable) -> None:
        super().__init__(folder, python)
        self.options = options
        self.workers: list[Child] = []
        n = options.workers
        self.http, self.nats, self.etcd, self.etcd_peer, *rest = free_ports(4 + 2 * n)
        self.system, self.events = rest[:n], rest[n:]
        self.model = folder / "model"

    # ---- start ---------------------------------------------------------------------------------

    def start(self) -> None:
        self.write_model()
        if self.options.form == "etcd":
            self._start_servers()
        self.start_frontend()
        self._start_workers()
        self._wait_for_workers(range(self.options.workers))

    def _start_servers(self) -> None:
        for program in ("nats-server", "etcd"):
            if shutil.which(program) is None:
                raise Trouble(f"there is no {program} here: tools/install-deps --dynamo, or take the "
                              "form that needs none (--form file)")
        store = self.folder / "nats"
        self.spawn("nats-server", ["nats-server", "-js", "-a", "127.0.0.1", "-p", str(self.nats),
                                   "--store_dir", str(store)])
        client, peer = (f"http://127.0.0.1:{p}" for p in (self.etcd, self.etcd_peer))
        self.spawn("etcd", ["etcd", "--data-dir", str(self.folder / "etcd"),
                            "--listen-client-urls", client, "--advertise-client-urls", client,
                            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                            "--initial-cluster", f"default={peer}"])
        self.wait("nats-server and etcd", 30, lambda: listens(self.nats) and listens(self.etcd))

    def start_frontend(self) -> None:
        self.frontend = self.spawn("frontend", [
            self.python, "-m", "dynamo.frontend", "--router-mode", self.options.router,
            "--http-port", str(self.http), *self._meeting()])

    def _meeting(self) -> list[str]:
        if self.options.form == "file":
            return ["--discovery-backend", "file"]
        arguments = ["--discovery-backend", "etcd"]
        if self.options.planes == "nats":
            arguments += ["--request-plane", "nats", "--event-plane", "nats"]
        return arguments

    def _start_workers(self) -> None:
        for number in range(self.options.workers):
            self.workers.append(self.start_worker(number))

    def start_worker(self, number: int, **environment: str) -> Child:
        """Each with an address, an SSD directory and an event endpoint of its own."""
        o = self.options
        extra = {
            "DYN_SYSTEM_PORT": str(self.system[number]),
            "FLEXKV_SERVER_RECV_PORT": f"ipc://{self.folder}/node{number}",
            "FLEXKV_CPU_CACHE_GB": o.cpu_cache, "FLEXKV_SSD_CACHE_GB": o.ssd_cache,
            "FLEXKV_SSD_CACHE_DIR": str(self.ssd_folder(number)),
            "DYNAMO_USE_FLEXKV": "1" if o.events and o.flexkv_events else "0",
        }
        arguments = ["--model", str(self.model), "--served-model-name", MODEL,
                     "--block-size", str(BLOCK), "--max-model-len", str(o.max_length),
                     # Other types round differently in batches of other shapes.
                     "--dtype", "float32", "--enforce-eager", *self._meeting()]
        if o.engine_blocks:
            arguments += ["--num-gpu-blocks-override", str(o.engine_blocks)]
        if o.events:
            arguments += ["--kv-events-config", json.dumps({
                "publisher": "zmq", "topic": "kv-events", "enable_kv_cache_events": True,
                "endpoint": f"tcp://*:{self.events[number]}"})]
        module = "dynamo.vllm"
        if o.flexkv:
            module = "flexkv.dynamo"
            arguments += ["--connector", "flexkv"]
            if number in o.own_connectors:
                arguments += ["--flexkv-own-connector"]
        return self.spawn(f"worker{number}", [self.python, "-m", module, *arguments,
                                              *o.worker_arguments],
                          extra | o.worker_environment | environment)

    def ssd_folder(self, number: int) -> Path:
        return self.folder / f"ssd{number}"

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        (self.folder / "discovery").mkdir(exist_ok=True)
        meet = {"DYN_FILE_KV": str(self.folder / "discovery")}
        if self.options.form == "etcd":
            meet = {"NATS_SERVER": f"nats://127.0.0.1:{self.nats}",
                    "ETCD_ENDPOINTS": f"http://127.0.0.1:{self.etcd}"}
        return super().environment(meet | extra)

    # ---- waiting -------------------------------------------------------------------------------

    def last(self) -> Child:
        return self.workers[-1] if self.workers else super().last()

    def _wait_for_workers(self, numbers: Any) -> None:
        """A worker says that it is ready; the front end knows of it a little later."""
        for number in numbers:
            self.wait(f"worker{number}", START_SECONDS, lambda n=number: self._ready(n), 1)
        self.wait("the front end", 60, lambda: MODEL in self._models())
        self.wait("the front end's list of workers", 60,
                  lambda: len(self.known_workers()) >= self.options.workers)

    def _ready(self, number: int) -> bool:
        status, body = self.ask("GET", "/health", port=self.system[number], seconds=5)
        return status == 200 and b'"ready"' in body

    def _models(self) -> str:
        status, body = self.ask("GET", "/v1/models", seconds=5)
        return body.decode(errors="replace") if status == 200 else ""

    def known_workers(self) -> set[int]:
        """The numbers of the instances that the front end sends requests to."""
        status, body = self.ask("GET", "/health", seconds=5)
        if status != 200:
            return set()
        return {i["instance_id"] for i in json.loads(body).get("instances", [])
                if i.get("endpoint") == "generate"}

    def instance(self, number: int) -> int:
        """The number by which Dynamo knows a worker. From its log, the only place that says so."""
        found = re.findall(r"WorkerKvQuery endpoint starting for worker (\d+)",
                           plain(self.workers[number].log))
        return int(found[-1]) if found else 0

    # ---- requests ------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Any = None, port: int = 0,
            seconds: float = REQUEST_SECONDS) -> tuple[int, bytes]:
        """(0, b"") where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http, timeout=seconds)
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def complete(self, prompt: list[int] | str, tokens: int = 8, worker: int | None = None,
                 **more: Any) -> Answer:
        """worker: the instance that it must go to; else the router chooses. What is refused while
        Dynamo's parts get to know each other is asked again."""
        nvext: dict[str, Any] = {"extra_fields": ["worker_id", "timing"]}
        if worker is not None:
            nvext["backend_instance_id"] = worker
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True, "nvext": nvext, **more}
        return self._answer("/v1/completions", body)

    def chat(self, text: str, tokens: int = 30) -> Answer:
        return self._answer("/v1/chat/completions", {
            "model": MODEL, "messages": [{"role": "user", "content": text}], "stream": False,
            "max_tokens": tokens, "temperature": 0,
            "nvext": {"extra_fields": ["worker_id", "timing"]}})

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        deadline = time.monotonic() + REQUEST_SECONDS
        while True:
            status, data = self.ask("POST", path, body)
            if status == 200:
                return _read(json.loads(data))
            for child in self.children:
                child.alive()
            if status not in (0, 404, 503) or time.monotonic() > deadline:
                raise Trouble(f"{path}: status {status}: {data[:300]!r}\n{self.frontend.tail()}")
            time.sleep(0.3)

    def routed(self) -> list[tuple[int, int]]:
        """Of each request that the router has placed: blocks found in the chosen worker's CPU tier
        and on its disks. From the front end's log, the only place that says so."""
        return [(int(m[1]), int(m[2])) for m in re.finditer(
            r"Selected worker.*?host_pinned_blocks=(\d+).*?disk_blocks=(\d+)",
            plain(self.frontend.log))]

    # ---- stop ----------------------------------------------------------------------------------

    def stop(self, patience: float) -> None:
        """Front end first, then workers, then what they meet by. Engine processes outlive a worker
        that was killed: whoever has our mark goes in the end."""
        late = ("nats-server", "etcd")
        for group in (lambda c: c.name not in late, lambda c: c.name in late):
            self.stop_children([c for c in self.children if group(c)], patience)
        end_marked(self.folder)

    def stop_children(self, children: list[Child], patience: float) -> None:
        stop_children(children, patience)
        self.children = [c for c in self.children if c not in children]

    def restart_worker(self, number: int, **environment: str) -> int:
        """kill -9, and again with the same directories; returns the instance's new number."""
        before = self.known_workers()
        self.stop_worker(number, 0)
        self.workers[number] = self.start_worker(number, **environment)
        self.wait(self.workers[number].name, START_SECONDS, lambda: self._ready(number), 1)
        self.wait("the front end's list of workers", 60, lambda: self.known_workers() - before)
        return self.instance(number)

    def stop_worker(self, number: int, patience: float = STOP_SECONDS) -> None:
        """And its engine's processes, also those that it left behind."""
        child = self.workers[number]
        group = child.process.pid
        self.stop_children([child], patience)
        end_processes(lambda: group_members(group))


def _read(body: dict[str, Any]) -> Answer:
    choice = (body.get("choices") or [{}])[0]
    text = choice.get("text")
    if text is None:
        text = (choice.get("message") or {}).get("content")
    extra = body.get("nvext") or {}
    details = (body.get("usage") or {}).get("prompt_tokens_details") or {}
    worker = extra.get("worker_id") or {}
    return Answer(text or "", int(worker.get("decode_worker_id") or 0),
                  float((extra.get("timing") or {}).get("kv_hit_rate") or 0),
                  int(details.get("cached_tokens") or 0), body)


if __name__ == "__main__":
    end_marked(Path(sys.argv[1]).resolve())
