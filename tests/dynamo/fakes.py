"""A deployment whose workers are fake_worker.py."""
import json
import select
import sys
from pathlib import Path

from deployment import Trouble
from spoken import SECONDS, Spoken


class Fakes(Spoken):
    PROGRAM = Path(__file__).resolve().parent / "fake_worker.py"

    def settings(self, number):
        return super().settings(number) | {
            "form": self.options.form, "planes": self.options.planes, "ssd": str(self.ssd_folder(number))}

    def hear(self, number):
        child = self.workers[number]
        ready, _, _ = select.select([child.process.stdout], [], [], SECONDS)
        line = child.process.stdout.readline() if ready else b""
        if not line:
            raise Trouble(f"{child.name} does not answer\n{child.tail()}")
        return json.loads(line)

    def tell(self, number, command, **arguments):
        child = self.workers[number]
        child.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        child.process.stdin.flush()
        return self.hear(number)

    def restart(self, number):
        """kill -9, and again with the same store."""
        self.stop_worker(number, 0)
        self.workers[number] = self.start_worker(number)
        self._wait_for_workers([number])


if __name__ == "__main__":
    sys.exit("run: tools/test dynamo")
