"""The command line of a worker: what was meant by `--connector flexkv`, which current releases of
Dynamo turn down, in the form that they take. Reads and writes nothing outside."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OWN = "--flexkv-own-connector"
OWN_MODULE = "flexkv.integration.vllm.connector"
TRANSFER, EVENTS = "--kv-transfer-config", "--kv-events-config"


class UsageError(Exception):
    pass


@dataclass
class Command:
    arguments: list[str]            # of dynamo.vllm
    transfer: dict[str, Any]
    events: dict[str, Any] | None = None    # None: nothing was said, the worker chooses a free port
    replicas: int = 1               # data-parallel ones in all
    ranks: int = 1                  # those that this process starts
    first_rank: int = 0


def translate(given: list[str], environment: Mapping[str, str]) -> Command:
    arguments = _dashes([a for a in given if a != OWN])
    connectors, arguments = _take_connectors(arguments)
    if not connectors and environment.get("DYN_CONNECTOR"):
        connectors = environment["DYN_CONNECTOR"].replace(",", " ").split()
    foreign = [c for c in connectors if c.lower() != "flexkv"]
    if foreign:
        raise UsageError(f"--connector {' '.join(connectors)}: this starts workers with flexkv alone; for several "
                         f"connectors give {TRANSFER} a MultiConnector that has FlexKVConnectorV1 in it")
    transfer = _json(arguments, TRANSFER)
    if transfer is None:
        transfer = {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both",
                    "kv_load_failure_policy": "recompute"}
        if OWN in given:
            transfer["kv_connector_module_path"] = OWN_MODULE
        arguments += [TRANSFER, json.dumps(transfer, separators=(",", ":"))]
    elif "FlexKVConnectorV1" not in json.dumps(transfer):
        raise UsageError(f"{TRANSFER} names {transfer.get('kv_connector')!r}, not FlexKVConnectorV1: "
                         "leave it out, or start python -m dynamo.vllm itself")
    elif OWN in given and transfer.get("kv_connector_module_path") != OWN_MODULE:
        raise UsageError(f"{OWN} and {TRANSFER} are both there: put "
                         f'"kv_connector_module_path":"{OWN_MODULE}" into the latter')
    replicas = _number(arguments, ("--data-parallel-size", "-dp")) or 1
    return Command(arguments, transfer, _json(arguments, EVENTS), replicas,
                   _number(arguments, ("--data-parallel-size-local", "-dpl")) or replicas,
                   _number(arguments, ("--data-parallel-start-rank", "-dpr")) or 0)


def _dashes(arguments: list[str]) -> list[str]:
    """--tensor_parallel_size is vLLM's spelling too."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = name.replace("_", "-") + equals + value
        spelled.append(argument)
    return spelled


def _take_connectors(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The values of --connector, and the other arguments."""
    connectors: list[str] = []
    others: list[str] = []
    i = 0
    while i < len(arguments):
        argument = arguments[i]
        i += 1
        if argument.startswith("--connector="):
            connectors += argument.partition("=")[2].replace(",", " ").split()
        elif argument == "--connector":
            start = i
            while i < len(arguments) and not arguments[i].startswith("-"):
                connectors += arguments[i].replace(",", " ").split()
                i += 1
            if i == start:
                raise UsageError("--connector needs a value: flexkv")
        else:
            others.append(argument)
    return connectors, others


def _value(arguments: list[str], names: tuple[str, ...]) -> str | None:
    """The last one counts, as for argparse."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name in names:
            if not equals and i + 1 == len(arguments):
                raise UsageError(f"{name} needs a value")
            value = after if equals else arguments[i + 1]
    return value


def _json(arguments: list[str], name: str) -> dict[str, Any] | None:
    text = _value(arguments, (name,))
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UsageError(f"{name} {text!r} is no JSON: {e}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{name} {text!r} is no JSON object")
    return value


def _number(arguments: list[str], names: tuple[str, ...]) -> int | None:
    text = _value(arguments, names)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{names[0]} {text!r} is no number") from None
