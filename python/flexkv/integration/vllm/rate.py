"""How fast the engine computes prompts, from its own steps."""
from __future__ import annotations

import statistics
from collections import deque
from typing import Any

MIN_TOKENS = 256        # fewer say more about the step than about the tokens
SAMPLES = 9
FIRST_AFTER = 3         # the first steps are slower than what follows
CHANGE = 0.1            # worth telling


class PrefillRate:
    def __init__(self, spaces: list[Any]) -> None:
        self._spaces = spaces
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._told = 0.0
        self._last_end = 0.0

    def step(self, tokens: int, start: float, end: float) -> None:
        """Steps may overlap: one begins to count when the one before has ended."""
        start = max(start, self._last_end)
        self._last_end = end
        if tokens < MIN_TOKENS or end <= start:
            return
        self._samples.append(tokens / (end - start))
        if len(self._samples) < FIRST_AFTER:
            return
        rate = statistics.median(self._samples)
        if abs(rate - self._told) > CHANGE * self._told:
            self._told = rate
            for space in self._spaces:
                space.set_compute_rate(rate)
