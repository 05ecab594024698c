"""What travels between the scheduler's side and the workers' side of a connector, both ways with
the engine's own messages: metadata with each step, statistics with each step's output.

Every process of the engine imports this module, and its objects are pickled: plain values only.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats


@dataclass
class FailedLoad:
    """A load that ended without all its blocks, or was given up. Workers make sure that nothing
    is copied for it any more before they tell the engine."""
    request_id: str
    ops: list[int]
    blocks: list[int]           # that hold nothing: the engine computes them
    whole: bool = False         # the load as a whole failed, whatever the blocks
    waiting: bool = True        # the engine holds the request until its load is reported


@dataclass
class LayerLoad:
    """A load that comes layer by layer while the step computes. Should it fail, the workers
    report its blocks with the same step."""
    request_id: str
    ops: list[int]
    blocks: list[int]


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step, from the scheduler to every worker."""
    step: int = 0
    fence: list[int] = field(default_factory=list)      # puts that must not read any more
    failed: list[FailedLoad] = field(default_factory=list)
    loads: list[LayerLoad] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)   # loads reported while they are on their way


# Statistics that are states, not counts: of several reports the last one counts.
GAUGES = frozenset({"cpu_blocks", "cpu_used_blocks", "ssd_blocks", "ssd_used_blocks"})


@dataclass
class StepStats(KVConnectorStats):
    """Counters since the last report. A worker's report is empty, and is there to carry the
    step it belongs to: an object that is not None also keeps an engine that runs in one process
    from skipping the scheduler's side in steps without tokens. fenced: in the worker this connector
    was called before the step, which not all engines do."""
    step: int = 0
    fenced: bool = False

    def reset(self) -> None:
        self.data = {}

    def clone_and_reset(self) -> StepStats:
        clone = StepStats(data=self.data, step=self.step, fenced=self.fenced)
        self.reset()
        return clone

    def is_empty(self) -> bool:
        return not self.data

    def to_dict(self) -> dict[str, Any]:
        return self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
        other_step = getattr(other, "step", 0)
        if self.step and other_step:
            self.step = min(self.step, other_step)
        else:
            self.step = self.step or other_step
        self.fenced = self.fenced and getattr(other, "fenced", False)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's periodic log line shows."""
        d = self.data
        line: dict[str, int | float] = {}
        queried = d.get("query_tokens", 0)
        if queried:
            hits = {tier: d.get(f"hit_{tier}_tokens", 0) for tier in ("cpu", "ssd", "peer")}
            line["FlexKV hit rate %"] = round(100 * sum(hits.values()) / queried, 1)
            for tier, tokens in hits.items():
                line["hit tokens " + tier] = tokens
        line["loaded blocks"] = d.get("loaded_blocks", 0)
        line["stored blocks"] = d.get("stored_blocks", 0)
        for name in ("failed_loads", "dropped_blocks", "errors"):
            if d.get(name):
                line[name.replace("_", " ")] = d[name]
        for tier in ("cpu", "ssd"):
            room = d.get(tier + "_blocks")
            if room:
                line[tier + " tier used %"] = round(100 * d[tier + "_used_blocks"] / room, 1)
        return line


def step_of(connector_output: Any) -> tuple[int, bool]:
    """The step whose output this is, 0 if nobody says, and whether all workers have fenced it.
    Connectors in a MultiConnector find their statistics under their class's name."""
    stats = getattr(connector_output, "kv_connector_stats", None)
    parts = getattr(stats, "data", None)
    for part in [stats, *(parts.values() if isinstance(parts, dict) else ())]:
        if isinstance(part, StepStats):
            return part.step, part.fenced
    return 0, False
