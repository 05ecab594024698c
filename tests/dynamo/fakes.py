"""A deployment whose workers are fake_worker.py."""
import json
import select
import subprocess
import sys
from pathlib import Path

from deployment import MODEL, Child, Deployment, Trouble

HERE = Path(__file__).resolve().parent
SECONDS = 60


class Fakes(Deployment):
    """`at[number]`: the instance of a worker, as Dynamo calls it."""

    def _start_workers(self):
        self.at = {}
        for number in range(self.options.workers):
            self.workers.append(self.start_worker(number))

    def start_worker(self, number):
        log = self.folder / f"worker{number}.log"
        settings = {"form": self.options.form, "planes": self.options.planes, "name": MODEL,
                    "model": str(self.model), "port": self.events[number],
                    "ssd": str(self.ssd_folder(number))}
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [self.python, HERE / "fake_worker.py", json.dumps(settings)], cwd=self.folder,
                env=self.environment({}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
                start_new_session=True)
        child = Child(f"worker{number}", process, log)
        self.children.append(child)
        return child

    def _wait_for_workers(self, numbers):
        for number in numbers:
            self.at[number] = self._hear(self.workers[number])["instance"]
        self.wait("the front end", SECONDS, lambda: MODEL in self._models())
        self.wait("the front end's list of workers", SECONDS,
                  lambda: set(self.at.values()) <= self.known_workers())

    def _hear(self, child):
        ready, _, _ = select.select([child.process.stdout], [], [], SECONDS)
        line = child.process.stdout.readline() if ready else b""
        if not line:
            raise Trouble(f"{child.name} does not answer\n{child.tail()}")
        return json.loads(line)

    def tell(self, number, command, **arguments):
        child = self.workers[number]
        child.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        child.process.stdin.flush()
        return self._hear(child)

    def restart(self, number):
        """kill -9, and again with the same store."""
        self.stop_worker(number, 0)
        self.workers[number] = self.start_worker(number)
        self._wait_for_workers([number])


if __name__ == "__main__":
    sys.exit("run: tools/test dynamo")
