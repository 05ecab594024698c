"""What the tests of KV events against Dynamo share: its standalone indexer, a node whose engine is played
here, and a model of what a router must answer, which knows nothing of the publisher."""
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("FLEXKV_BUILD", ROOT / "build"))
BIN = os.environ.get("FLEXKV_BIN", str(BUILD / "flexkv"))
DEADLINE = int(os.environ.get("FLEXKV_ORACLE_DEADLINE", "40"))
BLOCK = 4
SLICE = 4096
PAGES = 64
MODEL = "model"


def load_extension():
    """The installed package's module, or that of a build folder alone: no package needs to be installed."""
    if "FLEXKV_BUILD" not in os.environ:
        try:
            return importlib.import_module("flexkv._flexkv")
        except ImportError:
            pass
    path = BUILD / "python" / "_flexkv.abi3.so"
    if not path.exists():
        pytest.skip(f"{path} is not built: meson configure {BUILD.name} -Dpython=true", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("_flexkv", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_flexkv"] = module
    spec.loader.exec_module(module)
    return module


def dynamo_python():
    given = os.environ.get("FLEXKV_DYNAMO_PYTHON")
    cache = Path(os.environ.get("FLEXKV_CACHE_DIR") or
                 Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexkv")
    python = Path(given) if given else cache / "dynamo-1.6.1" / "bin" / "python"
    if given == "none" or not python.exists():
        pytest.skip(f"no Dynamo at {python}: tools/dynamo-env installs it", allow_module_level=True)
    return str(python)


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Service:
    """One of Dynamo's in the background. It forgets all when it is restarted."""

    MODULE, REGISTER = "", ""

    def __init__(self, place):
        self.place, self.port, self.process = place, free_port(), None
        self.registered = []
        self.start()

    def start(self):
        with open(self.place / "indexer.log", "ab") as log:
            self.process = subprocess.Popen(
                [dynamo_python(), "-m", self.MODULE, "--port", str(self.port), "--threads", "1"], stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "DYN_LOG": "info"}, start_new_session=True)
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            try:
                self.call("/health")
                break
            except OSError:
                assert self.process.poll() is None, f"{self.MODULE} does not start"
                time.sleep(0.05)
        for body in self.registered:
            self.call(self.REGISTER, body)

    def call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            text = answer.read()
        try:
            return json.loads(text)
        except ValueError:
            return text.decode()

    def signal(self, sig):
        os.kill(self.process.pid, sig)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()

    def log(self):
        return (self.place / "indexer.log").read_text(errors="replace")


class Indexer(Service):
    """The router's index alone."""

    MODULE, REGISTER = "dynamo.indexer", "/register"

    def register(self, instance, rank, endpoint, replay=None):
        body = {"instance_id": instance, "dp_rank": rank, "endpoint": endpoint, "model_name": MODEL,
                "block_size": BLOCK}
        if replay:
            body["replay_endpoint"] = replay
        self.registered.append(body)
        self.call("/register", body)

    def query(self, tokens, lora=None, salt=None):
        """{(instance, rank): tokens credited in all}, and {instance: (device, host, disk)}, cumulative."""
        body = {"token_ids": tokens, "model_name": MODEL}
        if lora:
            body["lora_name"] = lora
        if salt:
            body["cache_salt"] = salt
        answer = self.call("/query", body)
        return {int(i): (v.get("gpu", 0), v.get("cpu", 0), v.get("disk", 0)) for i, v in answer["instances"].items()}


class Selector(Service):
    """The router's choice of a worker, with its own index."""

    MODULE, REGISTER = "dynamo.select_service", "/workers"

    def register(self, instance, rank, endpoint, replay=None):
        body = {"worker_id": instance, "model_name": MODEL, "block_size": BLOCK, "endpoint": "http://127.0.0.1:1",
                "kv_events_endpoint": endpoint, "data_parallel_size": 1, "data_parallel_start_rank": rank,
                "total_kv_blocks": 10000, "max_num_batched_tokens": 8192}
        if replay:
            body["replay_endpoint"] = replay
        self.registered.append(body)
        self.call("/workers", body)

    def query(self, tokens, lora=None, salt=None):
        body = {"model_name": MODEL, "token_ids": tokens}
        if lora:
            body["lora_name"] = lora
        if salt:
            body["cache_salt"] = salt
        return {w["worker_id"]: tuple(BLOCK * w[f"{k}_blocks"] for k in ("device", "host_pinned", "disk"))
                for w in self.call("/overlap_scores", body)["workers"]}

    def select(self, tokens):
        return self.call("/select", {"model_name": MODEL, "token_ids": tokens})


class Tenant:
    """A namespace as a router knows it."""

    def __init__(self, name=None, lora=None, salt=None):
        self.name, self.lora, self.salt = name, lora, salt


TENANTS = [Tenant(), Tenant("salted", salt="ns1"), Tenant("adapter", lora="A"), Tenant("both", lora="A", salt="ns2")]


def chain(tenant, tokens):
    """Block hashes as an engine makes them: each covers all before it."""
    out, parent = [], f"{tenant.lora}/{tenant.salt}".encode()
    for i in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hashlib.blake2b(parent + repr(tokens[i:i + BLOCK]).encode(), digest_size=8).digest()
        out.append(int.from_bytes(parent, "big"))
    return out


class Engine:
    """A node, and puts with named blocks. Options are FlexKV's."""

    def __init__(self, flexkv, **options):
        self.flexkv, self.options = flexkv, {"cpu_cache_blocks": 200, "log_level": "ERROR", **options}
        self.memory = ctypes.create_string_buffer(SLICE * PAGES)
        self.open()

    def open_node(self):
        config = self.flexkv.Config()
        for key, value in self.options.items():
            config.set(key, str(value))
        return self.flexkv.Node.open(config)

    def register(self):
        self.space.register(0, [(ctypes.addressof(self.memory), SLICE, SLICE, PAGES)])

    def open(self):
        self.node = self.open_node()
        self.space = self.node.space(fingerprint=b"oracle", tokens_per_block=BLOCK, ranks=1, slice_bytes=SLICE)
        self.register()
        self.namespaces = {}
        for t in TENANTS:
            self.namespaces[t] = self.space.namespace(t.name) if t.name else self.space.namespace()
            self.namespaces[t].label(t.lora, t.salt)
        self.events = self.node.events()
        self.tiers = {"CPU": set(), "STORAGE": set()}

    def close(self):
        self.events.close()
        self.node.close()

    def reopen(self):
        self.close()
        self.open()

    def put(self, tenant, tokens):
        namespace, hashes = self.namespaces[tenant], chain(tenant, tokens)
        keys = namespace.keys_from_tokens(tokens)
        known = namespace.match(keys)
        if known.lease:
            self.node.release(known.lease)
        first, n = known.blocks, len(hashes)
        if first == n:
            return
        op = namespace.put(keys, first, list(range(n - first)), event_hashes=hashes[first:],
                           event_tokens=tokens[first * BLOCK:], event_parent=hashes[first - 1] if first else None)
        self.wait_for(op)

    def get(self, tenant, tokens):
        namespace = self.namespaces[tenant]
        known = namespace.match(namespace.keys_from_tokens(tokens))
        if known.lease:
            self.wait_for(self.node.get(known.lease, 0, list(range(known.blocks))))

    def wait_for(self, op):
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            if any(c.op == op for c in self.node.poll(max=16, timeout_ms=1000)):
                return
        raise AssertionError("an operation does not end")

    def quiet(self):
        """Nothing is on its way to the SSD, and our own subscription has nothing more to say."""
        end = time.monotonic() + DEADLINE
        while self.node.stats()["write_backlog_blocks"] and time.monotonic() < end:
            time.sleep(0.01)
        while True:
            got = self.events.take()
            for stored, medium, hashes, *_ in got:
                for h in hashes:
                    assert (h in self.tiers[medium]) != stored, "stored and removed do not alternate"
                    (self.tiers[medium].add if stored else self.tiers[medium].remove)(h)
            if not got:
                return

    def credit(self, tenant, tokens):
        """(device, host, disk) as a router must see it: leading blocks in host memory, then those that go on
        on disk; a host block behind a disk block counts for nothing. Compared with what a match finds, which
        knows nothing of events."""
        hashes = chain(tenant, tokens)
        cpu = 0
        while cpu < len(hashes) and hashes[cpu] in self.tiers["CPU"]:
            cpu += 1
        disk = cpu
        while disk < len(hashes) and hashes[disk] in self.tiers["STORAGE"]:
            disk += 1
        namespace = self.namespaces[tenant]
        found = namespace.match(namespace.keys_from_tokens(tokens))
        if found.lease:
            self.node.release(found.lease)
        some = [h in self.tiers["CPU"] or h in self.tiers["STORAGE"] for h in hashes] + [False]
        assert found.blocks == some.index(False), "events and match differ"
        assert found.cpu_blocks == sum(h in self.tiers["CPU"] for h in hashes[:found.blocks])
        return 0, cpu * BLOCK, disk * BLOCK


class DaemonEngine(Engine):
    """The same as a client of `flexkv serve`, whose node it is; options are the daemon's."""

    def __init__(self, flexkv, place, **options):
        self.place, self.address, self.daemon = place, f"ipc://{place}/daemon", None
        self.agent = None
        super().__init__(flexkv, **options)

    def start_daemon(self):
        sets = [x for k, v in self.options.items() for x in ("--set", f"{k}={v}")]
        with open(self.place / "daemon.log", "ab") as log:
            self.daemon = subprocess.Popen([BIN, "serve", "--address", self.address, *sets], stdout=log, stderr=log,
                                           stdin=subprocess.DEVNULL, start_new_session=True,
                                           env={k: v for k, v in os.environ.items() if not k.startswith("FLEXKV_")})

    def open(self):
        if not self.daemon or self.daemon.poll() is not None:
            self.start_daemon()
        if not self.agent:
            self.agent = self.flexkv.Agent(self.address, [(ctypes.addressof(self.memory), SLICE, SLICE, PAGES)])
        super().open()

    def open_node(self):
        end = time.monotonic() + DEADLINE
        while True:
            try:
                return self.flexkv.Node.connect(self.address)
            except self.flexkv.Error:
                assert time.monotonic() < end, (self.place / "daemon.log").read_text()
                time.sleep(0.05)

    def register(self):
        pass

    def kill_daemon(self):
        """kill -9 and a new one. The client goes on with it by itself, and so do subscriptions."""
        self.daemon.kill()
        self.daemon.wait()
        self.start_daemon()
        end = time.monotonic() + DEADLINE
        tokens = list(range(2**31, 2**31 + BLOCK))
        while time.monotonic() < end:
            try:
                self.put(TENANTS[0], tokens)
                if self.namespaces[TENANTS[0]].match(self.namespaces[TENANTS[0]].keys_from_tokens(tokens)).blocks:
                    return
            except self.flexkv.Error:
                pass
            time.sleep(0.05)
        raise AssertionError("the client does not find the new daemon")

    def close(self):
        super().close()
        self.agent.close()
        self.daemon.terminate()
        try:
            self.daemon.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
            raise


class Prompts:
    """Prompts that share beginnings: continuations of earlier ones, cut anywhere."""

    def __init__(self, seed):
        self.random, self.old = random.Random(seed), []

    def next(self):
        r = self.random
        tenant, start = (r.choice(self.old) if self.old and r.random() < 0.8 else (r.choice(TENANTS), []))
        start = start[:r.randrange(len(start) + 1) // BLOCK * BLOCK]
        more = [r.randrange(2**32) for _ in range(r.randrange(BLOCK, 12 * BLOCK))]
        tokens = (start + more)[:PAGES * BLOCK]
        self.old.append((tenant, tokens))
        if len(self.old) > 400:
            self.old.pop(r.randrange(len(self.old)))
        return tenant, tokens

    def query(self):
        """An old prompt, one that leaves it somewhere, or the same under another name."""
        r = self.random
        tenant, tokens = r.choice(self.old)
        cut = r.randrange(len(tokens) + 1)
        if r.random() < 0.3:
            tokens = tokens[:cut] + [r.randrange(2**32) for _ in range(8)]
        if r.random() < 0.1:
            tenant = r.choice(TENANTS)
        return tenant, tokens


def load(engine, prompts, steps):
    for step in range(steps):
        roll = prompts.random.random()
        if roll < 0.8 or not prompts.old:
            engine.put(*prompts.next())
        elif roll < 0.998 or step + 40 > steps:     # so that something is there in the end
            engine.get(*prompts.random.choice(prompts.old))
        else:
            engine.node.reset()


def compare(indexer, engines, prompts, queries):
    """Until all answers of a round are right; within the deadline. Returns how many were not zero."""
    end = time.monotonic() + DEADLINE
    asked = [prompts.query() for _ in range(queries)]
    for e in engines.values():
        e.quiet()
    while True:
        wrong, credited = None, 0
        for tenant, tokens in asked:
            answers = indexer.query(tokens, tenant.lora, tenant.salt)
            for instance, engine in engines.items():
                wanted, got = engine.credit(tenant, tokens), answers.get(instance, (0, 0, 0))
                credited += wanted[2] > 0
                if wanted != got:
                    wrong = (instance, tenant.__dict__, len(tokens), "wanted", wanted, "got", got)
                    break
            if wrong:
                break
        if not wrong:
            return credited
        assert time.monotonic() < end, f"{wrong}\n{indexer.log()[-3000:]}"
        time.sleep(0.1)
