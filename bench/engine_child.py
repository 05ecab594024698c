#!/usr/bin/env python3
"""A real vLLM engine in a process of its own that does one step at a time, for engine.py and tools/soak-engine.

As a program: python engine_child.py '{"model": ...}'. It reads steps, one JSON list a line, as tests/engine/vllm_run.py
knows them, and answers each with one line: {"seconds": s, "result": what the step has found} or {"error": text}.
"""
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).resolve().parent.parent / "tests" / "engine"
sys.path.insert(0, str(TESTS))

START_SECONDS = 420         # on a machine that does other things too
STEP_SECONDS = 180
EXIT_SECONDS = 30


class Ended(Exception):
    """The engine does not answer any more; the text has the end of its log."""


class EngineChild:
    """The parent's end."""

    def __init__(self, log: Path, arguments: dict[str, Any], env: dict[str, str]) -> None:
        from vllm_plans import environment
        self.log = log
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(arguments)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=out, start_new_session=True, cwd=log.parent, env=environment(**env))
        self._buffer = b""

    def ready(self) -> "EngineChild":
        self.answer(START_SECONDS)
        return self

    def send(self, *step: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(step).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self._why("it has ended")) from None

    def answer(self, within: float = STEP_SECONDS) -> dict[str, Any]:
        line = self.line(within)
        if "error" in line:
            raise Ended(f"{line['error']}\n{self._why('step failed')}")
        return line

    def line(self, within: float) -> dict[str, Any]:
        """The next answer, good or bad."""
        assert self.process.stdout is not None
        end = time.monotonic() + within
        while b"\n" not in self._buffer:
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Ended(self._why(f"no answer within {within:.0f} s"))
            got = os.read(self.process.stdout.fileno(), 1 << 16)
            if not got:
                raise Ended(self._why("it has ended"))
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def do(self, *step: Any, within: float = STEP_SECONDS) -> dict[str, Any]:
        self.send(*step)
        return self.answer(within)

    def _why(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return f"engine {self.log.stem}: {what}; end of its log:\n" + "\n".join(lines[-40:])

    def processes(self) -> dict[str, list[int]]:
        """Its processes that live: by what they are."""
        found: dict[str, list[int]] = {"main": [self.process.pid], "EngineCore": [], "Worker": [], "other": []}
        for pid in group(self.process.pid):
            name = next((n for n in ("EngineCore", "Worker") if n in command_of(pid)), "other")
            if pid != self.process.pid:
                found[name].append(pid)
        return found

    def close(self) -> None:
        """The end as a user has it, and the hard one for whatever stays."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def command_of(pid: int) -> str:
    """Engines name their processes by it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                pids.append(int(folder.name))
    return sorted(pids)


# ---- the child -----------------------------------------------------------------------------------

def say(answers: IO[str], line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                           # what vLLM prints belongs to the log
    from vllm_run import Run
    run = Run(json.loads(sys.argv[1]))
    say(answers, {})
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        start = time.perf_counter()
        try:
            getattr(run, kind)(*arguments)
        except Exception as error:          # the parent decides what it means
            say(answers, {"error": f"{kind}: {type(error).__name__}: {error}"})
            continue
        seconds = time.perf_counter() - start
        say(answers, {"seconds": seconds, "result": run.result.pop(arguments[0], None) if arguments else None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
