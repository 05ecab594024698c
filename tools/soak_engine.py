"""What tools/soak-engine runs, with the engine's python.

Two engines: one at a daemon, with vLLM's own connector class; one with a node of its own and FlexKV's class. Both have
a small cpu tier and an SSD tier whose reads fail now and then. Each round gives one of them a batch of prompts, does
something to it meanwhile, and compares what comes out with what an engine without FlexKV said.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "engine")]

from engine_child import Ended, EngineChild, command_of, group     # noqa: E402
from vllm_plans import connector, model                            # noqa: E402

PROMPTS, ANSWER = 20, 12
BATCH = (3, 8)
REQUEST_SECONDS = 120           # for a batch, whatever happens to it
GONE_SECONDS = 30               # for an engine's processes to go by themselves once one of them was killed
FREE_SECONDS = 40               # until all is given back: the longest of the deadlines below, and more
FAULTS = "read_error=0.03,read_flip=0.02"
SETTINGS = {
    "FLEXKV_CPU_CACHE_GB": "0.02", "FLEXKV_SSD_CACHE_GB": "0.5", "FLEXKV_OP_TIMEOUT_MS": "3000",
    "FLEXKV_LEASE_TIMEOUT_MS": "5000", "FLEXKV_SERVER_TIMEOUT_MS": "500", "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1", "FK_TEST_FAULT": FAULTS,
}
# What may happen to a daemon, and to an engine's process that goes on afterwards; and to one that does not.
DAEMON_FAULTS = ("kill", "stop", "stop")
ENGINE_FAULTS = (("stop", "Worker"), ("stop", "EngineCore"))
DEADLY = (("kill", "Worker"), ("kill", "EngineCore"))
DEADLY_EVERY = 8                # rounds: an engine takes its time to start again


class Wrong(Exception):
    """What must not be."""


def prompts() -> list[list[list[int]]]:
    """Some begin alike; some are so long that they are in several steps' blocks."""
    return [[[i % 4, 200 + 150 * (i % 3)], [100 + i, 60 + 37 * i % 200]] for i in range(PROMPTS)]


class Daemon:
    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"ipc://{folder}/daemon"
        (folder / "daemon-ssd").mkdir()
        self.start()

    def start(self) -> None:
        env = {**os.environ, **SETTINGS, "FLEXKV_SSD_CACHE_DIR": str(self.folder / "daemon-ssd")}
        with open(self.folder / "daemon.log", "ab") as log:
            self.process = subprocess.Popen([os.environ["FLEXKV_BIN"], "serve", "--address", self.address], env=env,
                                            stdin=subprocess.DEVNULL, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def held(self) -> dict[str, Any]:
        """What of it is not idle."""
        import json
        done = subprocess.run([os.environ["FLEXKV_BIN"], "status", "--json", self.address], capture_output=True, text=True,
                              timeout=20)
        if done.returncode:
            return {"status": done.stderr}
        status = json.loads(done.stdout)
        found = {name: status["stats"][name] for name in ("operations", "leases") if status["stats"][name]}
        found |= {i["name"]: i for i in status["instances"] if i["ended"] or i["jobs_out"]}
        return found


class Engine:
    def __init__(self, folder: Path, name: str, kind: str, daemon: Daemon | None) -> None:
        self.folder, self.name, self.kind, self.daemon = folder, name, kind, daemon
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.id = f"soak-{os.getpid()}-{self.name}-{self.starts}"
        env = dict(SETTINGS)
        if self.daemon is not None:
            env |= {"FLEXKV_SERVER_CLIENT_MODE": "1", "FLEXKV_SERVER_LAUNCH_MODE": "external",
                    "FLEXKV_SERVER_RECV_PORT": self.daemon.address}
        else:
            ssd = self.folder / f"{self.name}-ssd"
            ssd.mkdir(exist_ok=True)
            env["FLEXKV_SSD_CACHE_DIR"] = str(ssd)
        arguments = model(self.folder, "gqa") | (connector(self.kind, engine_id=self.id) if self.kind != "none" else {})
        self.child = EngineChild(self.folder / f"{self.name}.log", arguments, env)

    def ready(self) -> None:
        self.child.ready()
        self.processes = self.child.processes()

    def pids(self, role: str) -> list[int]:
        return self.processes[role]

    def restart(self) -> None:
        """After one of its processes was killed: the others must go by themselves. But for the main one: vLLM's LLM
        waits for an engine core that was killed for ever, with a connector or without; a user kills it."""
        if self.child.process.stdin is not None:
            self.child.process.stdin.close()

        def gone() -> bool:
            left = group(self.child.process.pid)
            if left and not set(self.pids("EngineCore")) & set(left):   # a killed worker's core ends a little later
                self.child.process.kill()
            return not left

        wait_until(gone, GONE_SECONDS,
                   lambda: f"{self.name}: processes stay: " + ", ".join(
                       f"{pid} {command_of(pid)[:60]}" for pid in group(self.child.process.pid)))
        self.child.kill()
        check_sockets(self.id)
        self.start()
        self.ready()


def wait_until(what: Any, within: float, message: Any) -> None:
    end = time.monotonic() + within
    while not what():
        if time.monotonic() > end:
            raise Wrong(f"{message()} (after {within:.0f} s)")
        time.sleep(0.05)


def check_sockets(name: str) -> None:
    left = [line for line in Path("/proc/net/unix").read_text().splitlines() if name in line]
    if left:
        raise Wrong(f"sockets stay: {left}")


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.counts = {"rounds": 0, "requests": 0, "cached tokens": 0, "engines killed": 0}
        self.expected = self.reference()
        self.daemon = Daemon(folder)
        self.engines = [Engine(folder, "at-daemon", "upstream", self.daemon), Engine(folder, "embedded", "ours", None)]
        for engine in self.engines:
            engine.ready()

    def reference(self) -> list[list[int]]:
        engine = Engine(self.folder, "reference", "none", None)
        try:
            engine.ready()
            done = engine.child.do("generate", "all", prompts(), ANSWER)
            return [output["tokens"] for output in done["result"]]
        finally:
            engine.child.close()

    # ---- a round ----

    def round(self) -> str:
        self.counts["rounds"] += 1
        engine = self.random.choice(self.engines)
        deadly = self.counts["rounds"] % DEADLY_EVERY == 0
        picked = self.random.sample(range(PROMPTS), self.random.randint(*BATCH))
        engine.child.do("reset", False, within=REQUEST_SECONDS)
        engine.child.send("generate", "batch", [prompts()[i] for i in picked], ANSWER)
        time.sleep(self.random.random() * self.random.choice((0.1, 0.5, 2.0)))
        told = self.faults(engine, deadly)
        answer = None if "EngineCore: kill" in told else self.answer(engine, deadly)
        if answer is not None:
            self.compare(engine, picked, answer)
        if deadly:
            self.counts["engines killed"] += 1
            told += ", engine started again"
            engine.restart()
        return f"{engine.name}: {len(picked)} prompts, {told}"

    def faults(self, engine: Engine, deadly: bool) -> str:
        told = []
        if engine.daemon is not None and self.random.random() < 0.7:
            told.append(self.daemon_fault())
        if deadly:
            told.append(self.engine_fault(engine, *self.random.choice(DEADLY)))
        elif engine.daemon is None or self.random.random() < 0.4:
            told.append(self.engine_fault(engine, *self.random.choice(ENGINE_FAULTS)))
        return ", ".join(told) or "nothing happens"

    def daemon_fault(self) -> str:
        kind = self.random.choice(DAEMON_FAULTS)
        pause = self.random.choice((0.1, 0.7, 2.0, 5.0)) * (0.5 + self.random.random())
        if kind == "kill":
            self.daemon.kill()
            time.sleep(pause / 2)
            self.daemon.start()
        else:
            self.daemon.process.send_signal(signal.SIGSTOP)
            time.sleep(pause)
            self.daemon.process.send_signal(signal.SIGCONT)
        return f"daemon: {kind} for {pause:.1f} s"

    def engine_fault(self, engine: Engine, kind: str, role: str) -> str:
        pid = self.random.choice(engine.pids(role))
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
            return f"{role}: kill"
        pause = self.random.choice((0.1, 0.7, 2.0, 5.0)) * (0.5 + self.random.random())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(pause)
        os.kill(pid, signal.SIGCONT)
        return f"{role}: stop for {pause:.1f} s"

    def answer(self, engine: Engine, deadly: bool) -> list[dict[str, Any]] | None:
        """None: the engine has failed, as it may where one of its processes was killed before it was done."""
        try:
            return engine.child.answer(REQUEST_SECONDS)["result"]
        except Ended as e:
            if not deadly or "no answer within" in str(e):
                raise Wrong(str(e)) from None
            return None

    def compare(self, engine: Engine, picked: list[int], outputs: list[dict[str, Any]]) -> None:
        for i, output in zip(picked, outputs, strict=True):
            self.counts["requests"] += 1
            self.counts["cached tokens"] += output["cached"]
            if output["reason"] != "length" or output["tokens"] != self.expected[i]:
                raise Wrong(f"{engine.name}: prompt {i} ({output['cached']} tokens from caches) ended for "
                            f"{output['reason']} with {output['tokens']}, not {self.expected[i]}")

    # ---- the end ----

    def finish(self) -> None:
        wait_until(lambda: not self.daemon.held(), FREE_SECONDS, lambda: f"the daemon holds {self.daemon.held()}")
        for engine in self.engines:
            metrics = engine.child.do("metrics", "metrics")["result"]
            print(f"{engine.name}: {metrics}")
            engine.child.close()
            wait_until(lambda: not group(engine.child.process.pid), GONE_SECONDS, lambda: "processes stay")
            check_sockets(engine.id)
        wait_until(lambda: not self.daemon.held(), FREE_SECONDS, lambda: f"the daemon holds {self.daemon.held()}")
        self.daemon.process.send_signal(signal.SIGTERM)
        if self.daemon.process.wait(30):
            raise Wrong("the daemon did not end well")
        check_sockets(str(self.folder))

    def close(self) -> None:
        for engine in getattr(self, "engines", ()):
            engine.child.kill()
        if hasattr(self, "daemon"):
            self.daemon.kill()


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    seed = int(os.environ.get("SOAK_SEED", "0")) or random.randrange(1, 1 << 30)
    print(f"SOAK_SEED={seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fks-", ignore_cleanup_errors=True) as folder:
        soak = None
        try:
            soak = Soak.__new__(Soak)
            soak.__init__(Path(folder), seed)           # what it has started is ended even if this fails
            begin = time.monotonic()
            while soak.counts["rounds"] < rounds and time.monotonic() - begin < seconds:
                print(f"{soak.counts['rounds'] + 1}: {soak.round()}", flush=True)
            soak.finish()
            print(f"{soak.counts}: all tokens are equal, nothing is left")
            return 0
        except (Wrong, Ended) as e:
            print(f"soak-engine: {e}", file=sys.stderr)
            if os.environ.get("SOAK_KEEP"):
                subprocess.run(["cp", "-r", folder, os.environ["SOAK_KEEP"]], check=False)
            return 1
        finally:
            if soak is not None:
                soak.close()


if __name__ == "__main__":
    sys.exit(main())
