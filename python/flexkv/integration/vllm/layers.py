"""A worker's part in loads that come layer by layer: before a layer's attention the step waits for
that layer's pages, and at its end it is told which loads did not come.

The waiting is the compute stream's. The host waits only until the copies are on their way, or on a
CPU until they are done.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from .protocol import FailedLoad, LayerLoad

logger = logging.getLogger("vllm.flexkv")


def stream_of(tensor: Any) -> Callable[[], int]:
    """What gives the stream that computes on the tensor; 0 for host memory."""
    device = tensor.device
    if device.type == "cpu":
        return lambda: 0
    from torch import cuda
    return lambda: int(cuda.current_stream(device).cuda_stream)


def not_loaded(load: LayerLoad) -> FailedLoad:
    return FailedLoad(load.request_id, load.ops, load.blocks, waiting=False)


class LayerLoads:
    def __init__(self, agent: Any, names: Sequence[str], stream: Callable[[], int],
                 timeout: float) -> None:
        """names: of the layers, in the order of their regions."""
        self._agent = agent
        self._number = {name: i for i, name in enumerate(names)}
        self._stream = stream
        self._timeout = timeout
        self._deadline = 0.0
        self._loads: list[LayerLoad] = []       # of this step, and good so far
        self._failed: list[LayerLoad] = []
        self._missing: set[int] = set()         # layers that have not been waited for
        self._hooked: set[int] = set()          # layers that the engine was seen to ask for

    @property
    def active(self) -> bool:
        return bool(self._loads)

    def begin(self, loads: list[LayerLoad], hooks: bool) -> None:
        """Before the step computes. hooks: the engine asks before each layer. What it may read
        without asking (an indexer's cache, say) is waited for here."""
        self._loads, self._failed = list(loads), []
        self._missing = set(range(len(self._number)))
        self._deadline = time.monotonic() + self._timeout
        self._wait_for(self._missing - self._hooked if hooks else self._missing)

    def wait(self, name: str) -> None:
        layer = self._number.get(name)
        if layer is None:               # it reads pages of another one
            self._wait_for(self._missing)
            return
        self._hooked.add(layer)
        if layer in self._missing:
            self._wait_for({layer})

    def _wait_for(self, layers: set[int]) -> None:
        stream = self._stream()
        for layer in sorted(layers):
            self._missing.discard(layer)
            for load in self._loads[:]:
                left = max(1, round(1000 * (self._deadline - time.monotonic())))
                status = self._agent.wait_layer(load.ops, layer, stream, left)
                if status < 0:
                    logger.warning("FlexKV: layer %d of operations %s did not come: %s", layer,
                                   load.ops, status)
                    self._loads.remove(load)
                    self._failed.append(load)

    def finish(self) -> list[FailedLoad]:
        """The loads of this step that failed. A layer that nobody asked for was computed on
        whatever was there."""
        if self._loads and self._missing:
            logger.error("FlexKV: the engine did not ask for %d of %d layers: what was loaded is "
                         "computed again", len(self._missing), len(self._number))
            self._hooked -= self._missing
            self._failed += self._loads
        failed, self._loads, self._failed = self._failed, [], []
        return [not_loaded(load) for load in failed]
