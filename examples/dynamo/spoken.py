"""A deployment whose workers are not dynamo.vllm but a program that is spoken with: a line of JSON on its standard input, a line on
its standard output. Used by routing.py beside it and by tests/dynamo."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployment import MODEL, Child, Deployment

SECONDS = 60                    # for any one answer of front end or worker


class Spoken(Deployment):
    """`at[number]`: the instance of a worker, as Dynamo calls it."""

    PROGRAM: Path               # gets one argument, the settings as JSON; says {"instance": number} when it is there

    def settings(self, number: int) -> dict[str, Any]:
        return {"name": MODEL, "model": str(self.model), "port": self.events[number]}

    def hear(self, number: int) -> dict[str, Any]:
        """The next line of that worker."""
        raise NotImplementedError

    def start_worker(self, number: int) -> Child:       # type: ignore[override]
        return self.spawn(f"worker{number}", [self.python, self.PROGRAM, json.dumps(self.settings(number))], talks=True)

    def _wait_for_workers(self, numbers: Any) -> None:
        self.at = getattr(self, "at", {})
        for number in numbers:
            self.at[number] = self.hear(number)["instance"]
        self.wait("the front end", SECONDS, lambda: MODEL in self._models())
        self.wait("the front end's list of workers", SECONDS,
                  lambda: set(self.at.values()) <= self.known_workers())
