"""The processes of the chaos test: a daemon, engines that use it, an engine with a node of its own; what may happen to
them, and what must hold then. Every wait has a deadline; a world that is closed leaves nothing behind."""
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from memory import FIELDS, LEAVE, REST, RUN, WORKERS, Memory

HERE = Path(__file__).resolve().parent
START = 30.0            # seconds until a process that was started must be at work
RECOVER = 20.0          # from the end of the faults of a round until all engines put and get again
SETTINGS = {
    "FLEXKV_CPU_CACHE_BLOCKS": "150", "FLEXKV_OP_TIMEOUT_MS": "600", "FLEXKV_LEASE_TIMEOUT_MS": "700",
    "FLEXKV_SERVER_TIMEOUT_MS": "500", "FLEXKV_LOG_LEVEL": "INFO", "FLEXKV_EVICT_START_THRESHOLD": "0.9",
}


class Broken(Exception):
    """Something that must hold does not."""


def wait_until(what: Callable[[], bool], within: float, message: Callable[[], str] | str) -> None:
    end = time.monotonic() + within
    while not what():
        if time.monotonic() > end:
            raise Broken(f"{message() if callable(message) else message} (waited {within:.0f} s)")
        time.sleep(0.01)


class Process:
    """One that is started again after it was killed."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name, self.command, self.env, self.log = name, command, env, log
        self.process: subprocess.Popen[bytes] | None = None
        self.pids: list[int] = []

    def start(self, extra: tuple[str, ...] = ()) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*self.command, *extra], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=self.env)
        self.pids.append(self.process.pid)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Engine:
    def __init__(self, world: "World", name: str, address: str, embedded: bool) -> None:
        self.name, self.embedded, self.world = name, embedded, world
        self.file = world.place / name
        self.memory = Memory(self.file, create=True)
        self.starts = 0
        env = world.env | (world.ssd(name) if embedded else {})
        program = [sys.executable, str(HERE / "engine.py")]
        self.workers = [Process(f"{name}.worker{w}", [*program, "worker", str(self.file), address, name, str(w)], env,
                                world.place / f"{name}.log") for w in range(WORKERS)]
        self.scheduler = Process(f"{name}.scheduler", [*program, "scheduler", str(self.file), address, name,
                                                      "embedded" if embedded else "client"], env,
                                 world.place / f"{name}.log")
        for worker in self.workers:
            worker.start()
        self.start_scheduler()

    def start_scheduler(self) -> None:
        self.starts += 1
        self.scheduler.start((f"{self.world.seed}-{self.name}-{self.starts}",))

    def counts(self) -> dict[str, int]:
        return {field: self.memory[field] for field in FIELDS}

    def check(self) -> None:
        """What it has found itself, and whether all of its processes live."""
        report = Path(f"{self.file}.report")
        if report.exists():
            raise Broken(report.read_text())
        for process in (self.scheduler, *self.workers):
            if not process.running():
                raise Broken(f"{process.name} has ended")

    def works_since(self, before: dict[str, int]) -> bool:
        self.check()
        return all(self.memory[field] > before[field] + 1 for field in ("puts_ok", "gets_ok"))


class World:
    def __init__(self, place: Path, program: str, library: str, seed: int, engines: int = 2) -> None:
        self.place, self.seed = place, seed
        self.random = random.Random(seed)
        self.done: list[str] = []           # what has happened
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLEXKV_", "NOTIFY_"))}
        self.env = clean | SETTINGS | {"FLEXKV_LIB": library}
        # A socket file or an abstract name, as the seed will have it.
        self.address = f"ipc://{place}/d" if self.random.random() < 0.5 else f"ipc://@{place.name}-d"
        self.daemon = Process("daemon", [program, "serve", "--address", self.address], self.env | self.ssd("daemon"),
                              place / "daemon.log")
        self.program = program
        self.engines: list[Engine] = []
        self.daemon.start()
        for i in range(engines):
            self.engines.append(Engine(self, f"e{i}", self.address, embedded=False))
        self.engines.append(Engine(self, "own", f"ipc://@{place.name}-own", embedded=True))

    def ssd(self, name: str) -> dict[str, str]:
        folder = self.place / f"{name}.ssd"
        folder.mkdir(exist_ok=True)
        return {"FLEXKV_SSD_CACHE_BLOCKS": "400", "FLEXKV_SSD_CACHE_DIR": str(folder)}

    # ---- faults ----

    def processes(self) -> list[tuple[Process, Engine | None]]:
        """A list in which the daemon is as likely as all that is left of an engine."""
        found: list[tuple[Process, Engine | None]] = [(self.daemon, None)] * 3
        for engine in self.engines:
            found += [(engine.scheduler, engine)] + [(worker, engine) for worker in engine.workers]
        return found

    def plan(self) -> list[tuple[float, str, Callable[[], None]]]:
        """One to five faults that overlap: (when, what, how)."""
        steps: list[tuple[float, str, Callable[[], None]]] = []
        victims: list[Process] = []
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3, 5))):
            process, engine = self.random.choice(self.processes())
            if process in victims:
                continue
            victims.append(process)
            at = self.random.random() * 0.4
            if self.random.random() < 0.5:
                end = at + self.random.random() * 0.3
                steps.append((at, f"kill {process.name}", process.kill))
                steps.append((end, f"start {process.name}", self.starter(process, engine)))
            else:
                # Up to more than all limits of operations and calls.
                end = at + self.random.choice((0.05, 0.05, 0.2, 0.2, 0.7, 0.7, 1.4, 2.0)) * (0.5 + self.random.random())
                steps.append((at, f"stop {process.name}", self.stopper(process, engine)))
                steps.append((end, f"continue {process.name}", lambda p=process: p.signal(signal.SIGCONT)))
        return sorted(steps, key=lambda step: step[0])

    def starter(self, process: Process, engine: Engine | None) -> Callable[[], None]:
        return engine.start_scheduler if engine is not None and process is engine.scheduler else process.start

    def stopper(self, process: Process, engine: Engine | None) -> Callable[[], None]:
        def stop() -> None:
            if engine is not None:
                engine.memory.count("pauses")
            process.signal(signal.SIGSTOP)
        return stop

    def round(self) -> None:
        began = time.monotonic()
        for at, what, how in self.plan():
            time.sleep(max(0.0, began + at - time.monotonic()))
            self.done.append(f"{at:.2f} {what}")
            how()
        if self.random.random() < 0.75:         # else the next faults meet what is just coming back
            self.recovered()
            self.done.append(f"recovered after {time.monotonic() - began:.1f} s")

    def recovered(self, within: float = RECOVER) -> None:
        """All engines put and get again; whoever was killed has come back."""
        before = [engine.counts() for engine in self.engines]
        wait_until(lambda: all([engine.works_since(was) for engine, was in zip(self.engines, before)]), within,
                   lambda: "engines that do not put and get again: " + "; ".join(
                       f"{engine.name}: {engine.counts()}, before: {was}"
                       for engine, was in zip(self.engines, before) if not engine.works_since(was)))
        if not self.daemon.running():
            raise Broken("the daemon has ended")

    # ---- nothing is left ----

    def status(self) -> dict:
        done = subprocess.run([self.program, "status", "--json", self.address], capture_output=True, text=True, timeout=20,
                              env=self.env)
        if done.returncode:
            raise Broken(f"flexkv status: {done.stderr}")
        return json.loads(done.stdout)

    def rest(self) -> None:
        """Traffic ends. Then nothing may be under way or held, of operations, leases and copies, in any node."""
        self.recovered()
        for engine in self.engines:
            engine.memory["phase"] = REST
            Path(f"{engine.file}.status").unlink(missing_ok=True)
        for engine in self.engines:
            wait_until(lambda: engine.memory["ops_open"] == 0, 30, f"{engine.name}: operations stay")
            engine.check()
        wait_until(lambda: not held(self.status()), 20, lambda: f"the daemon holds {held(self.status())}")
        for engine in self.engines:
            if engine.embedded:
                path = Path(f"{engine.file}.status")
                wait_until(lambda: path.exists() and not held(json.loads(path.read_text())), 20,
                           lambda: f"{engine.name} holds {held(json.loads(path.read_text()))}")
        for engine in self.engines:
            engine.check()

    def resume(self) -> None:
        for engine in self.engines:
            engine.memory["phase"] = RUN

    def reset(self) -> None:
        """While there is no traffic: with its blocks gone the daemon must have all slots."""
        from api import Node
        node = Node(self.address, listen=False)
        try:
            node.reset()
        finally:
            node.close()

        def used() -> list[tuple[int, int]]:
            return [(s["cpu_used"], s["ssd_used"]) for s in self.status()["spaces"]]
        wait_until(lambda: all(u == (0, 0) for u in used()), 20, lambda: f"slots that never come back: {used()}")

    def leave(self) -> None:
        """All engines end while they work; the daemon must be as if they had never been there."""
        self.recovered()
        for engine in self.engines:
            engine.memory["phase"] = LEAVE
        for engine in self.engines:
            assert engine.scheduler.process is not None
            try:
                status = engine.scheduler.process.wait(60)
            except subprocess.TimeoutExpired:
                raise Broken(f"{engine.name} does not end") from None
            if status:
                raise Broken(f"{engine.name}'s scheduler ended with {status}")
            if Path(f"{engine.file}.report").exists():
                raise Broken(Path(f"{engine.file}.report").read_text())
            for worker in engine.workers:
                worker.kill()

        def left() -> list:
            status = self.status()
            return [*status["instances"], *status["waiting_agents"], *status["clients"][1:]]
        wait_until(lambda: not left(), 20, lambda: f"the daemon still has {left()}")
        fds = open_files(self.daemon.pids[-1])
        if any("flexkv-agent" in fd for fd in fds):
            raise Broken(f"the daemon keeps memory of agents that are gone: {fds}")
        self.daemon.signal(signal.SIGTERM)
        assert self.daemon.process is not None
        if self.daemon.process.wait(20) != 0:
            raise Broken("the daemon did not end well")

    def left_over(self) -> list[str]:
        """Of a world that has ended: names of sockets, processes."""
        sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if self.place.name in line]
        files = [str(path) for path in self.place.iterdir() if path.is_socket()]
        return sockets + files + [f"process {pid}" for pid in self.every_pid() if Path(f"/proc/{pid}").exists()]

    def every_pid(self) -> list[int]:
        every = [self.daemon, *(p for e in self.engines for p in (e.scheduler, *e.workers))]
        return [pid for process in every for pid in process.pids]

    def close(self) -> None:
        for engine in self.engines:
            for process in (engine.scheduler, *engine.workers):
                process.kill()
        self.daemon.kill()


def open_files(pid: int) -> list[str]:
    """What is closed meanwhile is not among them."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def held(status: dict) -> dict:
    """What is not idle."""
    stats = status["stats"]
    found = {name: stats[name] for name in ("operations", "leases", "write_backlog_blocks") if stats[name]}
    for instance in status["instances"]:
        if instance["ended"] or instance["jobs_out"] or any(agent["jobs"] for agent in instance["agents"]):
            found[instance["name"]] = instance
    return found
