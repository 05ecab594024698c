"""Nodes of a cluster as processes, with a real Redis: in sync, killed, cut off; Redis killed, emptied, hung, full,
with passwords, ACLs, TLS. Each test has a Redis of its own, in a private folder, that never outlives it."""
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from daemon_rig import BIN, DEADLINE, clean_env, run, stop, stopped, wait_until, world  # noqa: F401

NODE = Path(os.environ.get("FLEXKV_BUILD", Path(BIN).parent)) / "tests" / "cluster" / "cluster_node"
SERVER = shutil.which("redis-server") or "/usr/bin/redis-server"
TTL_MS = 1500

pytestmark = pytest.mark.skipif(not Path(SERVER).exists() or not NODE.exists(),
                                reason="needs redis-server (tools/install-deps --test) and the built tests")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Redis:
    def __init__(self, place, *args, port=0):
        self.place, self.args, self.port = place, args, port
        self.path = str(place / "r.sock")
        self.process = None
        self.start()

    def start(self):
        Path(self.path).unlink(missing_ok=True)
        log = open(self.place / "redis.log", "ab")
        self.process = subprocess.Popen(
            [SERVER, "--port", str(self.port), "--unixsocket", self.path, "--save", "", "--dir", str(self.place),
             *map(str, self.args)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()
        self.wait()

    def wait(self):
        """A socket is there before anybody listens at it."""
        def answers():
            try:
                return self.ask("PING")         # or says that a password is missing
            except OSError:
                return False
        wait_until(answers, message="redis-server did not start")

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def ask(self, *words, login=None):
        """One command in RESP2; its raw answer as nested lists of str, int, None."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(DEADLINE)
            s.connect(self.path)
            f = s.makefile("rwb")
            if login:
                send(f, "AUTH", *login)
                receive(f)
            send(f, *words)
            return receive(f)

    def keys(self):
        return sorted(self.ask("KEYS", "*"))


def send(f, *words):
    f.write(b"*%d\r\n" % len(words))
    for w in words:
        w = str(w).encode()
        f.write(b"$%d\r\n%s\r\n" % (len(w), w))
    f.flush()


def receive(f):
    line = f.readline().rstrip(b"\r\n")
    kind, rest = line[:1], line[1:]
    if kind == b"$":
        n = int(rest)
        return None if n < 0 else f.read(n + 2)[:-2].decode("latin-1")
    if kind == b"*":
        return [receive(f) for _ in range(max(0, int(rest)))]
    return int(rest) if kind == b":" else rest.decode()


class Node:
    def __init__(self, place, redis, name, *more, ttl_ms=TTL_MS, batches=512, host=None, port=0, cluster="t"):
        self.log_path = place / f"{name}.log"
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [NODE, host or redis.path, str(port), cluster, name, str(ttl_ms), str(batches), *more],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=clean_env())

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip("\n")

    def found(self, first, n):
        return int(self.ask(f"find {first} {n}").split()[0])

    def peers(self):
        return {p.split(":")[0]: p.split(":")[1:] for p in self.ask("peers").split()}

    def stats(self):
        return {k: int(v) for k, v in (x.split("=") for x in self.ask("stats").split())}

    def log(self):
        return self.log_path.read_text()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def quit(self):
        self.process.stdin.close()
        self.process.wait(DEADLINE)


def synced(*nodes):
    for n in nodes:
        wait_until(lambda: len(n.peers()) == len(nodes) - 1 and all(p[2] == "1" for p in n.peers().values()),
                   message=lambda: f"{n.log_path.stem} does not know all peers: {n.log()}")


def seen(node, first, n, message="blocks are not seen"):
    wait_until(lambda: node.found(first, n) == n, message=message)


def test_three_nodes_know_each_others_blocks(world):
    redis = world(Redis)
    redis.ask("SET", "foreign", "1")
    nodes = [world(Node, redis, name) for name in ("a", "b", "c")]
    synced(*nodes)
    for i, n in enumerate(nodes):
        n.ask(f"add {i * 1000} 700")
    for n in nodes:
        for i, other in enumerate(nodes):
            if other is not n:
                seen(n, i * 1000, 700)
    nodes[0].ask("remove 100 50")
    wait_until(lambda: nodes[1].found(0, 700) == 100 and nodes[2].found(100, 1) == 0)
    assert nodes[2].ask("find 1000 1").split()[1].startswith("b:")
    for key in redis.keys():
        assert key == "foreign" or key.startswith("flexkv:{t}:")
        assert key == "foreign" or int(redis.ask("PTTL", key)) > 0, f"{key} has no TTL"
    for n in nodes:
        n.quit()
    assert [k for k in redis.keys() if not k.endswith((":control", ":epoch"))] == ["foreign"]
    assert redis.ask("GET", "foreign") == "1"


def test_a_killed_node_is_forgotten_within_ttl_and_a_second(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a"), world(Node, redis, "b")
    synced(a, b)
    b.ask("add 0 100")
    seen(a, 0, 100)
    b.kill()
    died = time.monotonic()
    while a.found(0, 1) and time.monotonic() < died + DEADLINE:
        time.sleep(0.01)
    took = time.monotonic() - died
    assert took < TTL_MS / 1000 + 1, took
    wait_until(lambda: not [k for k in redis.keys() if ":b" in k], message="its keys are still there")


def test_a_node_that_comes_back_is_another(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a"), world(Node, redis, "b")
    synced(a, b)
    b.ask("add 0 100")
    seen(a, 0, 100)
    before = int(b.ask("epoch"))
    b.kill()
    again = world(Node, redis, "b")
    again.ask("add 500 10")
    seen(a, 500, 10)
    assert a.found(0, 1) == 0
    assert int(again.ask("epoch")) > before
    assert a.ask("find 500 1").split()[1] == f"b:{again.ask('epoch')}"


def test_a_node_that_hung_learns_that_it_was_replaced(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a"), world(Node, redis, "b")
    synced(a, b)
    b.ask("add 0 10")
    seen(a, 0, 10)
    with stopped(b.process):
        again = world(Node, redis, "b")
        again.ask("add 500 10")
        seen(a, 500, 10)
    wait_until(lambda: b.ask("epoch") == "0", message="it still takes itself for a member")
    assert "node_name" in b.log()
    b.ask("add 900 10")
    again.ask("add 600 10")
    seen(a, 600, 10)
    assert a.found(900, 1) == 0
    again.quit()
    seen(a, 900, 10, "the name is free, and the first one does not come back")
    assert a.found(500, 1) == 0


@pytest.mark.parametrize("how", ["killed and restarted empty", "flushed", "hung", "killed for long"])
def test_redis_fails_and_all_heals(world, how):
    redis = world(Redis)
    nodes = [world(Node, redis, name) for name in ("a", "b", "c")]
    synced(*nodes)
    for i, n in enumerate(nodes):
        n.ask(f"add {i * 1000} 300")
    for n in nodes:
        for i, other in enumerate(nodes):
            if other is not n:
                seen(n, i * 1000, 300)
    if how == "flushed":
        redis.ask("FLUSHALL")
    elif how == "hung":
        stop(redis.process)
    else:
        redis.kill()
    nodes[0].ask("add 5000 100")
    nodes[0].ask("remove 0 50")
    assert nodes[0].ask("stats")                # answers: nobody waits for Redis
    if how in ("hung", "killed for long"):
        wait_until(lambda: all(not n.peers() for n in nodes), within=TTL_MS / 1000 + 1 + DEADLINE,
                   message="leases do not end")
        assert nodes[1].found(0, 1) == 0
    if how == "hung":
        redis.process.send_signal(signal.SIGCONT)
    elif how != "flushed":
        redis.start()
    synced(*nodes)
    for n in nodes[1:]:
        seen(n, 5000, 100)
        seen(n, 50, 250)
        assert n.found(0, 1) == 0
    nodes[2].ask("add 7000 10")
    seen(nodes[0], 7000, 10)
    seen(nodes[0], 1000, 300)
    for key in redis.keys():
        assert int(redis.ask("PTTL", key)) > 0, f"{key} has no TTL"


def test_who_fell_behind_takes_a_snapshot(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a", batches=100, ttl_ms=20000), world(Node, redis, "b", ttl_ms=20000)
    synced(a, b)
    with stopped(b.process):
        for i in range(400):                    # far more batches than the stream keeps
            a.ask(f"add {i * 50} 50")
            time.sleep(0.006)
        a.ask("remove 0 10")
    wait_until(lambda: b.found(10, 19990) == 19990, message="it did not catch up")
    assert b.found(0, 1) == 0
    stats = b.stats()
    assert stats["snapshots_read"] >= 1 and stats["holders"] == 19990
    late = world(Node, redis, "late", ttl_ms=20000)
    wait_until(lambda: late.found(10, 19990) == 19990, message="a newcomer did not catch up")


def test_a_busy_cluster_costs_few_commands_and_an_idle_one_next_to_none(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a", ttl_ms=30000), world(Node, redis, "b", ttl_ms=30000)
    synced(a, b)
    a.ask("add 0 10000")
    seen(b, 0, 10000)
    assert a.stats()["publish"] < 10000 / 50
    before = a.stats()["commands"] + b.stats()["commands"]
    time.sleep(3)
    assert a.stats()["commands"] + b.stats()["commands"] - before < 20


def test_a_wrong_password_is_said_once_and_names_the_setting(world):
    redis = world(Redis, "--requirepass", "right")
    a = world(Node, redis, "a", "password=wrong")
    wait_until(lambda: "redis_password" in a.log())
    time.sleep(1)
    assert a.log().count("redis_password") == 1, a.log()
    none = world(Node, redis, "none")
    wait_until(lambda: "redis_password" in none.log())
    good = world(Node, redis, "good", "password=right")
    wait_until(lambda: int(good.ask("epoch")) > 0)
    status = run("cluster", "status", "--redis", redis.path, "--set", "cluster_name=t")
    assert status.returncode == 1 and "redis_password" in status.stderr
    status = run("cluster", "status", "--redis", redis.path, "--set", "cluster_name=t", "--set",
                 "redis_password=right")
    assert status.returncode == 0 and "good" in status.stdout


ACL = ("+auth +select +ping +time +get +mget +set +del +eval +xadd +xread +xrevrange +pexpire +zadd +zrem "
       "+zrange +zscore +zcard").split()


def test_an_acl_user_for_our_keys_only_is_enough(world):
    redis = world(Redis)
    redis.ask("ACL", "SETUSER", "kv", "on", ">pw", "resetkeys", "~flexkv:*", "-@all", *ACL)
    redis.ask("SET", "foreign", "1")
    a = world(Node, redis, "a", "user=kv", "password=pw", batches=100, ttl_ms=20000)
    a.ask("add 0 1000")
    for i in range(200):
        a.ask(f"add {i} 1")
        time.sleep(0.006)
    b = world(Node, redis, "b", "user=kv", "password=pw", ttl_ms=20000)
    wait_until(lambda: b.found(0, 1000) == 1000, message=lambda: a.log() + b.log())
    assert "NOPERM" not in a.log() + b.log()
    assert "denied" not in "".join(map(str, redis.ask("ACL", "LOG"))), redis.ask("ACL", "LOG")
    assert redis.ask("ACL", "LOG") == []
    a.quit()
    assert redis.ask("ACL", "LOG") == []


def test_a_user_without_rights_is_told_which_setting(world):
    redis = world(Redis)
    redis.ask("ACL", "SETUSER", "kv", "on", ">pw", "~other:*", "+@all")
    a = world(Node, redis, "a", "user=kv", "password=pw")
    wait_until(lambda: "redis_user" in a.log())
    assert a.ask("epoch") == "0"


def test_another_database_and_another_cluster_are_apart(world):
    redis = world(Redis)
    a, b = world(Node, redis, "a", "db=1"), world(Node, redis, "b", "db=1")
    other = world(Node, redis, "c", "db=1", cluster="u")
    elsewhere = world(Node, redis, "d")
    synced(a, b)
    a.ask("add 0 100")
    seen(b, 0, 100)
    assert other.found(0, 1) == 0 and elsewhere.found(0, 1) == 0
    assert not other.peers() and not elsewhere.peers()


def test_a_full_redis_is_waited_for(world):
    redis = world(Redis, "--maxmemory-policy", "noeviction")
    a, b = world(Node, redis, "a", ttl_ms=20000), world(Node, redis, "b", ttl_ms=20000)
    synced(a, b)
    redis.ask("CONFIG", "SET", "maxmemory", "1")
    a.ask("add 0 100")
    wait_until(lambda: "maxmemory" in a.log())
    assert b.found(0, 1) == 0
    redis.ask("CONFIG", "SET", "maxmemory", "0")
    seen(b, 0, 100)


def test_somebody_elses_key_under_our_name_is_left_alone(world):
    redis = world(Redis)
    redis.ask("SET", "flexkv:{t}:members", "mine")
    a = world(Node, redis, "a")
    wait_until(lambda: "cluster_name" in a.log())
    assert redis.ask("GET", "flexkv:{t}:members") == "mine"


def certificate(place, name, ca=None):
    key, cert = place / f"{name}.key", place / f"{name}.pem"
    args = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
            "2", "-keyout", key, "-out", cert, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(list(map(str, args)), check=True, capture_output=True)
    return key, cert


def test_tls_with_a_certificate_that_is_checked(world, tmp_path):
    key, cert = certificate(tmp_path, "redis")
    _, other = certificate(tmp_path, "other")
    port = free_port()
    redis = world(Redis, "--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file",
                  cert, "--tls-auth-clients", "no")
    tls = {"host": "127.0.0.1", "port": port}
    a = world(Node, redis, "a", "tls=1", f"ca={cert}", **tls)
    b = world(Node, redis, "b", "tls=1", f"ca={cert}", **tls)
    synced(a, b)
    a.ask("add 0 20000")
    seen(b, 0, 20000)
    wrong = world(Node, redis, "wrong", "tls=1", f"ca={other}", **tls)
    wait_until(lambda: "redis_tls_ca" in wrong.log())
    assert wrong.ask("epoch") == "0"


def test_status_and_bench_on_the_command_line(world):
    redis = world(Redis)
    a = world(Node, redis, "node-1", ttl_ms=20000)
    wait_until(lambda: int(a.ask("epoch")) > 0)
    status = run("cluster", "status", "--redis", redis.path, "--set", "cluster_name=t", "--json")
    assert status.returncode == 0, status.stderr
    assert '"name": "node-1"' in status.stdout and '"test=nowhere"' in status.stdout
    before = redis.keys()
    bench = run("cluster", "bench", "--redis", redis.path, "--seconds", "1", "--rate", "2000", "--json", timeout=60)
    assert bench.returncode == 0, bench.stderr + bench.stdout
    assert redis.keys() == before
    nobody = run("cluster", "status", "--redis", "127.0.0.1:1", "--timeout", "300")
    assert nobody.returncode == 1 and "127.0.0.1" in nobody.stderr
    assert run("cluster").returncode == 2
