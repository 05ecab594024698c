"""What the parts of the scheduler's side share."""
from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from .events import Events
from .requests import Space
from .settings import Settings

logger = logging.getLogger("vllm.flexkv")
INTERVAL = 10.0         # seconds between two log lines of a kind


class Context:
    def __init__(self, settings: Settings, node: Any, spaces: list[Space], alignment: int) -> None:
        self.settings = settings
        self.node = node
        self.spaces = spaces
        self.alignment = alignment      # tokens
        self.count: Counter[str] = Counter()    # statistics since the last report
        self.null_page = 0              # the engine's page for what a window has left behind
        self.pool: Any = None           # the engine's blocks, where it lets us hold them
        self.events: Events | None = None
        self._last: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()

    def trouble(self, what: str, error: object) -> None:
        """Something that costs hits, not tokens: counted, and logged once in a while."""
        self.count["errors"] += 1
        now = time.monotonic()
        if now - self._last.get(what, -INTERVAL) < INTERVAL:
            self._left_out[what] += 1
            return
        self._last[what] = now
        left_out = self._left_out.pop(what, 0)
        more = f" ({left_out} more like this)" if left_out else ""
        logger.warning("FlexKV: %s: %s%s", what, error, more)
