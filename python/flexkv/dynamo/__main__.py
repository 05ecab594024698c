"""python -m flexkv.dynamo [--flexkv-own-connector] [--flexkv-show] ARGUMENTS OF dynamo.vllm

Becomes `python -m dynamo.vllm` with FlexKV as its KV connector, after it has looked whether what
the settings name can be had. See docs/dynamo.md.
"""
from __future__ import annotations

import importlib.util
import os
import shlex
import sys

from .checks import Taken, check
from .command import UsageError, translate

SHOW = "--flexkv-show"              # prints the command and ends, without any check
EVENTS = "DYNAMO_USE_FLEXKV"
WORKER = ("-m", "dynamo.vllm")


def has_dynamo() -> bool:
    try:
        return importlib.util.find_spec("dynamo.vllm") is not None
    except ModuleNotFoundError:
        return False


def main(given: list[str]) -> int:
    try:
        command = translate([a for a in given if a != SHOW], os.environ)
        if SHOW in given:
            print(shlex.join([sys.executable, *WORKER, *command.arguments]))
            return 0
        if not has_dynamo():
            raise UsageError(f"{sys.executable} has no dynamo.vllm: install ai-dynamo[vllm], or "
                             "run tools/dynamo-env --vllm, which prints a python that has it")
        held = check(command)
    except (UsageError, Taken) as e:
        print(f"flexkv.dynamo: {e}", file=sys.stderr)
        return 2
    for resource in held:           # until the worker ends
        os.set_inheritable(resource.fileno(), True)
    os.environ.pop("DYN_CONNECTOR", None)
    os.environ.setdefault(EVENTS, "1")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *WORKER, *command.arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
