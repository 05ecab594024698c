"""Several FlexKV nodes on this machine, each with a real vLLM server, and the Redis by which they know each other; started,
asked and stopped, every wait with a deadline. Each node has what a machine of its own would have: a configuration
file, a daemon, an engine, directories; and, if asked for, a network namespace with a line of limited speed.

Used by serving.py and demo.py beside it and by tests/multi_node. Runs with the python that tools/engine-env prints, with
FlexKV's package in PYTHONPATH.

    python cluster.py FOLDER     ends what was left of a cluster in the folder, networks too
"""
from __future__ import annotations

import ctypes
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import (Child, Processes, Trouble, end_marked, end_processes, free_ports,  # noqa: E402
                       group_members, stop_children)

START_SECONDS = 420
REQUEST_SECONDS = 180
SETTLE_SECONDS = 30
BLOCK = 32                      # tokens; vLLM's CPU attention takes multiples of it
MODEL = "tiny"
NETWORK = "10.77.0"             # inside namespaces: nobody outside sees it
CLONE_NEWNET = 0x40000000


@dataclass
class Options:
    nodes: int = 2
    base_port: int = 0          # of vLLM's servers, one after the other; 0: free ones
    model: str = ""             # a folder; "": one with random weights
    transport: str = ""         # p2p_transport; "": the default
    cpu_cache: str = "256M"
    ssd_cache: str = "0"
    network: bool = False       # each node in a network namespace
    rate: str = "1gbit"         # of its line, both ways
    cluster: str = "multi-node"
    redis: str = ""             # HOST:PORT of one that is there already; "": one is started
    redis_password: str = ""
    clean: bool = True          # remove this cluster's keys from that one
    alone: bool = False         # one engine more, of no cluster, to compare with
    events: bool = False        # KV events of engine and FlexKV
    settings: dict[str, Any] = field(default_factory=dict)      # more options of FlexKV


@dataclass
class Answer:
    tokens: list[int]
    cached: int                 # of the prompt's tokens
    prompt: int
    first_token: float          # seconds


class Node:
    """One engine with its FlexKV daemon."""

    def __init__(self, number: int, ip: str, port: int, event_port: int, namespace: str, folder: Path) -> None:
        self.number, self.ip, self.port, self.event_port = number, ip, port, event_port
        self.namespace, self.folder = namespace, folder
        self.name = f"node{number}"
        self.address = f"ipc://{folder}/flexkv_server_{number}"
        self.daemon: Child | None = None
        self.engine: Child | None = None

    def prefix(self) -> list[str]:
        """Before a command that is to run on it."""
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []

    def connection(self, seconds: float = REQUEST_SECONDS) -> http.client.HTTPConnection:
        c = http.client.HTTPConnection(self.ip, self.port, timeout=seconds)
        if self.namespace:
            with inside(self.namespace):        # a socket belongs to where it was made
                c.connect()
        return c

    def ask(self, method: str, path: str, body: Any = None, seconds: float = REQUEST_SECONDS) -> tuple[int, bytes]:
        """(0, b"") where nobody answers."""
        try:
            c = self.connection(seconds)
            try:
                c.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
                reply = c.getresponse()
                return reply.status, reply.read()
            finally:
                c.close()
        except (OSError, http.client.HTTPException):
            return 0, b""

    def complete(self, prompt: list[int], tokens: int = 8, **more: Any) -> Answer:
        """Greedy, with the engine's own prefix cache emptied before: what is reused is FlexKV's."""
        self.reset()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "return_token_ids": True, "stream_options": {"include_usage": True}, **more}
        start, first, said, usage = time.monotonic(), 0.0, [], {}
        try:
            c = self.connection()
            try:
                c.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                reply = c.getresponse()
                if reply.status != 200:
                    raise Trouble(f"{self.name}: status {reply.status}: {reply.read(300)!r}")
                for line in reply:
                    if not line.startswith(b"data: {"):
                        continue
                    first = first or time.monotonic() - start
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", []):
                        said += choice.get("token_ids") or []
            finally:
                c.close()
        except (OSError, http.client.HTTPException) as e:
            raise Trouble(f"{self.name} broke off an answer: {e}\n{self.tail()}") from e
        if len(said) != tokens:
            raise Trouble(f"{self.name} gave {len(said)} tokens of {tokens}\n{self.tail()}")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(said, cached, len(prompt), first)

    def reset(self) -> None:
        """The engine's own prefix cache; it refuses while a transfer holds blocks."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            status, body = self.ask("POST", "/reset_prefix_cache", seconds=20)
            if status == 200 and json.loads(body)["success"]:
                return
            time.sleep(0.02)
        raise Trouble(f"{self.name}: its prefix cache could not be reset for 20 s\n{self.tail()}")

    def status(self) -> dict[str, Any] | None:
        done = subprocess.run([flexkv(), "status", "--json", self.address], capture_output=True, timeout=30)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def tail(self) -> str:
        return self.engine.tail() if self.engine else ""


def flexkv() -> str:
    from flexkv.program import find_program
    return find_program()


class inside:
    """This thread in a network namespace."""

    def __init__(self, namespace: str) -> None:
        self.path = f"/run/netns/{namespace}"

    def __enter__(self) -> None:
        self.before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(self.path, os.O_RDONLY)
        self.enter(there)
        os.close(there)

    def __exit__(self, *_: object) -> None:
        self.enter(self.before)
        os.close(self.before)

    @staticmethod
    def enter(fd: int) -> None:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


# ---- networks --------------------------------------------------------------------------------------

def command(*words: str, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise Trouble(f"{' '.join(words)}: {done.stderr.strip()}")


class Network:
    """A bridge in a namespace of its own, and a line from it to the namespace of each node. All of it is in namespaces whose
    names are in the folder, so that it can be removed by whoever comes next."""

    def __init__(self, folder: Path, nodes: int, rate: str) -> None:
        for program in ("ip", "tc"):
            if shutil.which(program) is None:
                raise Trouble(f"network namespaces need {program} (Debian: iproute2)")
        if os.geteuid():
            raise Trouble("network namespaces need root")
        self.list, self.rate = folder / "namespaces", rate
        tag = f"flexkv-{os.getpid()}"
        self.hub, self.nodes = f"{tag}-hub", [f"{tag}-{n}" for n in range(nodes)]

    def up(self) -> None:
        self.list.write_text("\n".join([self.hub, *self.nodes]) + "\n")
        for name in [self.hub, *self.nodes]:
            command("ip", "netns", "add", name)
            command("ip", "-n", name, "link", "set", "lo", "up")
        command("ip", "-n", self.hub, "link", "add", "br0", "type", "bridge")
        command("ip", "-n", self.hub, "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        command("ip", "-n", self.hub, "link", "set", "br0", "up")
        for n, name in enumerate(self.nodes):
            line = f"line{n}"
            command("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", line, "netns", self.hub)
            command("ip", "-n", self.hub, "link", "set", line, "master", "br0", "up")
            command("ip", "-n", name, "addr", "add", f"{NETWORK}.{10 + n}/24", "dev", "eth0")
            command("ip", "-n", name, "link", "set", "eth0", "up")
            for where, device in ((name, "eth0"), (self.hub, line)):
                command("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", "rate", self.rate, "burst", "512kb",
                        "latency", "50ms")

    @staticmethod
    def down(folder: Path) -> None:
        listed = folder / "namespaces"
        for name in listed.read_text().split() if listed.exists() else []:
            command("ip", "netns", "del", name, check=False)
        listed.unlink(missing_ok=True)


# ---- the cluster -----------------------------------------------------------------------------------

class Cluster(Processes):
    """The folder's path must be short, as sockets lie in it."""

    NOT_THEIRS = (*Processes.NOT_THEIRS, "MOONCAKE_")

    def __init__(self, folder: Path, options: Options, python: str = sys.executable) -> None:
        super().__init__(folder, python)
        self.options = options
        self.redis: Child | None = None
        self.password = options.redis_password or secrets.token_hex(16)
        self.network = Network(folder, options.nodes, options.rate) if options.network else None
        n = options.nodes
        ports = free_ports(2 * n + 3)
        http_ports = [options.base_port + i for i in range(n)] if options.base_port else ports[:n]
        self.redis_host, self.redis_port = (f"{NETWORK}.1" if self.network else "127.0.0.1"), ports[-1]
        if options.redis:
            host, _, port = options.redis.rpartition(":")
            self.redis_host, self.redis_port = host, int(port)
        self.nodes = [Node(i, f"{NETWORK}.{10 + i}" if self.network else "127.0.0.1", http_ports[i], ports[n + i],
                           self.network.nodes[i] if self.network else "", folder) for i in range(n)]
        self.alone = Node(n, "127.0.0.1", ports[-2], ports[-3], "", folder) if options.alone else None

    @property
    def all(self) -> list[Node]:
        return self.nodes + ([self.alone] if self.alone else [])

    # ---- start ---------------------------------------------------------------------------------

    def start(self) -> None:
        if self.network:
            self.network.up()
        if self.options.redis:
            if self.options.clean:
                self.clean_redis()
        else:
            self.start_redis()
        if not self.options.model:
            self.write_model()
        for node in self.all:
            self.start_daemon(node)
        for node in self.all:
            self.start_engine(node)
        for node in self.all:
            self.wait(node.name, START_SECONDS, lambda node=node: node.ask("GET", "/health", seconds=5)[0] == 200, 0.5)
        self.wait("the nodes' knowledge of each other", SETTLE_SECONDS, self.met)

    def start_redis(self) -> None:
        """With a password; in the hub of the network, if there is one. The password is not in the command line."""
        if shutil.which("redis-server") is None:
            raise Trouble("there is no redis-server here (Debian: redis-server), and REDIS_HOST names none")
        config = self.folder / "redis.conf"
        config.touch(0o600)
        config.write_text(f"bind {self.redis_host}\nport {self.redis_port}\nrequirepass {self.password}\nsave \"\"\n"
                          f"appendonly no\nprotected-mode yes\ndir {self.folder}\n")
        inside_it = ["ip", "netns", "exec", self.network.hub] if self.network else []
        self.redis = self.spawn("redis", [*inside_it, "redis-server", str(config)], {})
        self.wait("redis", 20, lambda: self.redis_cli("ping") == "PONG", 0.1)

    def redis_cli(self, *words: str, stdin: str | None = None) -> str:
        inside_it = ["ip", "netns", "exec", self.network.hub] if self.network else []
        done = subprocess.run([*inside_it, "redis-cli", "-h", self.redis_host, "-p", str(self.redis_port), *words],
                              env={**os.environ, "REDISCLI_AUTH": self.password}, input=stdin, capture_output=True, text=True,
                              timeout=30)
        return done.stdout.strip()

    def clean_redis(self) -> None:
        """This cluster's keys and nothing else: what they begin with is said in docs/cluster.md."""
        if self.redis_cli("ping") != "PONG":
            raise Trouble(f"no Redis answers at {self.redis_host}:{self.redis_port}, or it wants another REDIS_PASSWORD")
        keys = self.redis_cli("--scan", "--pattern", f"flexkv:{{{self.options.cluster}}}:*").splitlines()
        for i in range(0, len(keys), 500):
            self.redis_cli("unlink", *keys[i:i + 500])

    def write_config(self, node: Node) -> Path:
        """What would be on a machine of its own, with the reference's names."""
        o = self.options
        member = node is not self.alone
        config = {
            "cpu_cache_gb": o.cpu_cache, "ssd_cache_gb": o.ssd_cache, "ssd_cache_dir": str(self.folder / f"ssd{node.number}"),
            "enable_p2p_cpu": member, "enable_p2p_ssd": member and o.ssd_cache != "0",
            "redis_host": self.redis_host, "redis_port": self.redis_port, "redis_password": self.password,
            "local_ip": node.ip, "local_zmq_ip": node.ip, "local_zmq_port": 5454 + 4 * node.number,
            "cluster_name": o.cluster, "node_ttl_seconds": 10, **o.settings,
        }
        if o.transport:
            config["p2p_transport"] = o.transport
        path = self.folder / f"flexkv_config_{node.number}.json"
        path.touch(0o600)
        path.write_text(json.dumps(config, indent=1) + "\n")
        return path

    def start_daemon(self, node: Node) -> None:
        """Apart from the engine, so that `flexkv status` can ask it; an engine alone could have the node in itself."""
        extra = {"FLEXKV_CONFIG_PATH": str(self.write_config(node)), "FLEXKV_LEASE_TTL_MS": "30000"}
        if self.options.transport == "mooncake":
            extra["MOONCAKE_CONFIG_PATH"] = str(self.write_mooncake(node))
        if self.options.events:
            extra["DYNAMO_USE_FLEXKV"] = "1"
        node.daemon = self.spawn(f"{node.name}-flexkv", [*node.prefix(), flexkv(), "serve", "--address", node.address], extra)
        self.wait(node.daemon.name, 30, lambda: node.status() is not None)

    def start_engine(self, node: Node) -> None:
        o = self.options
        transfer = {"kv_connector": "FlexKVConnectorV1", "kv_connector_module_path": "flexkv.integration.vllm.connector",
                    "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", o.model or str(self.folder / "model"),
                 "--served-model-name", MODEL, "--host", node.ip, "--port", str(node.port),
                 # Other types round differently in batches of other shapes.
                 "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", "8192",
                 "--max-num-batched-tokens", "8192", "--enable-prompt-tokens-details",
                 "--kv-transfer-config", json.dumps(transfer)]
        extra = {"FLEXKV_SERVER_RECV_PORT": node.address, "FLEXKV_SERVER_CLIENT_MODE": "1",
                 "FLEXKV_SERVER_LAUNCH_MODE": "external"}
        if o.events:
            extra["DYNAMO_USE_FLEXKV"] = "1"
            words += ["--kv-events-config", json.dumps({
                "publisher": "zmq", "topic": "kv-events", "enable_kv_cache_events": True,
                "endpoint": f"tcp://*:{node.event_port}"})]
        node.engine = self.spawn(node.name, node.prefix() + words, extra)

    def write_mooncake(self, node: Node) -> Path:
        path = self.folder / f"mooncake_config_{node.number}.json"
        path.write_text(json.dumps({"engine_ip": node.ip, "engine_port": 0, "metadata_backend": "p2p",
                                    "metadata_server": "P2PHANDSHAKE", "metadata_server_auth": "", "protocol": "tcp",
                                    "device_name": ""}, indent=1) + "\n")
        return path

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        return super().environment({"VLLM_HOST_IP": "127.0.0.1", "VLLM_SERVER_DEV_MODE": "1"} | extra)

    # ---- waiting -------------------------------------------------------------------------------

    def met(self) -> bool:
        """Each node knows all others, and has read what they have."""
        for node in self.nodes:
            peers = ((node.status() or {}).get("cluster") or {}).get("peers") or []
            if sum(p["alive"] and p["synced"] for p in peers) < len(self.nodes) - 1:
                return False
        return True

    def settle(self) -> None:
        """Until each node knows what all others have now. A node's blocks are those in its tiers."""
        self.wait("the nodes' knowledge of each other's blocks", SETTLE_SECONDS, self._settled)

    def _settled(self) -> bool:
        known, held = [], []
        for node in self.nodes:
            status = node.status()
            if not status or status["cluster"]["changes_pending"]:
                return False
            known.append(status["cluster"]["remote_blocks"])
            held.append(sum(s["cpu_used"] + s["ssd_used"] for s in status["spaces"]))
        return all(k == sum(held) - h for k, h in zip(known, held))

    # ---- stop ----------------------------------------------------------------------------------

    def stop(self, patience: float) -> None:
        """Engines first, then what they use; processes that outlived them; then networks."""
        for node in self.all if patience else []:
            (self.folder / f"{node.name}-status.log").write_text(json.dumps(node.status(), indent=1) + "\n")
        engines = [n.engine for n in self.all if n.engine]
        daemons = [n.daemon for n in self.all if n.daemon]
        for group in (engines, daemons, [self.redis] if self.redis else []):
            stop_children(group, patience)
        # vLLM's processes write their title over their environment, and with it our mark: they are found by their group.
        for child in self.children:
            end_processes(lambda group=child.process.pid: group_members(group))
        self.children.clear()
        clean_up(self.folder)


def clean_up(folder: Path) -> None:
    end_marked(folder)
    Network.down(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    clean_up(Path(sys.argv[1]).resolve())
