"""What FlexKV holds in an idle engine's processes, beyond the pool that it shares with all of them; part of engine.py.

Proportional set size, from /proc/PID/smaps, without the mappings of the pool: once for processes that have nothing but
FlexKV in them, once for the real engine's against those of an engine without a connector.
"""
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import engine_table as table
from engine_time import CONNECTORS, Engines

BAR_MB = 50
POOL = "memfd:flexkv-pool"
PAGES, PAGE_BYTES = 4096, 32 << 10      # of the worker that is measured alone: 128 MiB of KV that nobody has touched
SETTLE = 3.0                            # seconds


def pss_mb(pid: int | str = "self") -> float:
    """Without the pool."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):     # a mapping's first line
            counts = POOL not in line
        elif field == "Pss:" and counts:
            total += int(rest.split()[0])
    return total / 1024


# ---- processes with nothing but FlexKV -----------------------------------------------------------

def alone(role: str, address: str) -> None:
    """Runs in a process of its own: prints what it holds before and after."""
    before = pss_mb()
    import flexkv
    imported = pss_mb()
    memory = ctypes.create_string_buffer(1)     # keeps what is made below
    regions = []
    if role != "client":
        base = ctypes.CDLL(None).mmap
        base.restype, base.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        regions = [(base(None, PAGES * PAGE_BYTES, 3, 0x22, -1, 0), PAGE_BYTES, PAGE_BYTES, PAGES)]
    if role == "worker":
        kept: object = flexkv.Agent(address, regions, instance="memory")
    else:
        kept = flexkv.Node.connect(address) if role == "client" else flexkv.Node.open()
        if role == "node":
            kept.listen(address)
        kept.space(fingerprint=b"memory", tokens_per_block=32, instance="memory", workers=1, wait_ms=20000)
    print(before, imported, "ready", flush=True)
    sys.stdin.readline()
    print(pss_mb(), flush=True)
    del kept, memory


def _measure_alone(client: bool) -> list[tuple[str, ...]]:
    with tempfile.TemporaryDirectory(prefix="fk-bench-") as folder:
        address = f"ipc://{folder}/node"
        env = {**os.environ, "FLEXKV_CPU_CACHE_GB": "1", "FLEXKV_LOG_LEVEL": "ERROR"}
        roles = {"worker": "worker: agent", "node": "scheduler: node in it"}
        daemon = None
        if client:
            from flexkv.integration.vllm.node import find_program
            roles = {"worker": "worker: agent of a daemon", "client": "scheduler: client of a daemon"}
            daemon = subprocess.Popen([find_program(), "serve", "--address", address], env=env)
        processes = {role: subprocess.Popen([sys.executable, __file__, role, address], env=env, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, text=True) for role in roles}
        rows = []
        try:
            waiting = {role: processes[role].stdout.readline().split() for role in reversed(roles)}
            time.sleep(SETTLE)
            for role, title in roles.items():
                before = float(waiting[role][0])
                after = float(processes[role].communicate("\n", timeout=30)[0])
                rows.append((title, f"{before:.1f}", f"{after:.1f}", f"{after - before:.1f}",
                             table.verdict(after - before, BAR_MB)))
            if daemon is not None:
                rows.append(("the daemon itself", "", f"{pss_mb(daemon.pid):.1f}", "", ""))
        finally:
            for process in [*processes.values(), *([daemon] if daemon else [])]:
                process.kill()
                process.wait()
        return rows


# ---- the engine's --------------------------------------------------------------------------------

def _measure_engine(dtype: str, kind: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="fk-bench-") as folder, Engines(Path(folder), dtype) as engines:
        engine = engines.start(kind, kind, FLEXKV_CPU_CACHE_GB="1").ready()
        for seed in range(3):
            engine.do("generate", "ask", [[[seed, 512]]], 4)
        time.sleep(SETTLE)
        found = engine.processes()
        return {role: sum(pss_mb(pid) for pid in found[role]) for role in ("main", "EngineCore", "Worker")}


def run(dtype: str) -> None:
    rows = _measure_alone(client=False) + _measure_alone(client=True)
    table.show("Memory beyond the pool of 1 GiB, processes with nothing but FlexKV (MB, PSS)",
               ("", "before", "after", "FlexKV", "bar"), rows, ("before: the Python interpreter.",))
    engines = {kind: _measure_engine(dtype, kind) for kind in ("none", "upstream", "ours")}
    rows = []
    for role in ("main", "EngineCore", "Worker"):
        for kind in ("upstream", "ours"):
            more = engines[kind][role] - engines["none"][role]
            rows.append((f"{role}, {CONNECTORS[kind]}", f"{engines['none'][role]:.0f}", f"{engines[kind][role]:.0f}",
                         f"{more:.0f}", table.verdict(more, BAR_MB)))
    table.show("Memory of the real engine's processes, idle, without the pool (MB, PSS)",
               ("", "without", "with", "more", "bar"), rows)


if __name__ == "__main__":
    alone(sys.argv[1], sys.argv[2])
