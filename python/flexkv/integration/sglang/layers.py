"""What SGLang's KV pool asks before each layer of a forward pass: are the loads that it needs there?

One thread starts loads (the scheduler's), another runs forward passes; a pass that begins takes all loads
that were started before, as any of its requests may need them.
"""
from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkv.server.client import KVTPClient


class LayerCounter:
    def __init__(self, client: KVTPClient, timeout_ms: int) -> None:
        self._client = client
        self._timeout_ms = timeout_ms
        self._lock = threading.Lock()
        self._started: list[int] = []       # operations that no pass has taken yet
        self._taken: list[int] = []         # of the pass under way
        self._layer = -1                    # that it asked for last
        self._loads = 0

    def begin(self, operation: int) -> int:
        """Returns a number that SGLang calls the producer."""
        with self._lock:
            self._started.append(operation)
            self._loads += 1
            return self._loads

    def set_consumer(self, number: int) -> None:
        """SGLang may say which load a pass is about; all are waited for."""

    def reset(self) -> None:
        with self._lock:
            self._started, self._taken, self._layer = [], [], -1

    def wait_until(self, layer: int) -> None:
        """Returns when the layer may be used. Raises if it was not loaded: it must not be."""
        with self._lock:
            if layer == self._layer:            # V after K; or the next pass, of a single layer
                operations, self._started = self._started, []
                self._taken += operations
            else:
                if layer < self._layer or self._layer < 0:
                    self._taken, self._started = self._started, []
                operations = list(self._taken)
            self._layer = layer
        if not operations:
            return
        rc = self._client.wait_layer(operations, layer, self._timeout_ms)
        if rc:
            raise RuntimeError(f"FlexKV: layer {layer} was not loaded: "
                               f"{errno.errorcode.get(-rc, rc)}; the log says why")
