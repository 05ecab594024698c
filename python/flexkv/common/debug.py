"""The logger of the Python side: the same prefix and levels as the library's own lines.

FLEXKV_LOGGING_PREFIX and FLEXKV_LOG_LEVEL are read once, when this module is imported.
"""
from __future__ import annotations

import logging
import os
import sys

_LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.CRITICAL,
    "FATAL": logging.CRITICAL,
    "OFF": logging.CRITICAL + 1,
}


class FlexKVLogger(logging.Logger):
    """A standard logger whose level may be given by name, OFF included."""

    def set_level(self, level: str) -> None:
        self.setLevel(_LEVELS.get(level.upper(), logging.INFO))

    def is_enabled_for(self, level: int) -> bool:
        return self.isEnabledFor(level)


def _make_logger() -> FlexKVLogger:
    logger = FlexKVLogger("flexkv")
    prefix = os.environ.get("FLEXKV_LOGGING_PREFIX", "FLEXKV")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(
        f"[{prefix}] %(levelname)s %(asctime)s.%(msecs)03d [%(filename)s:%(lineno)d] %(message)s",
        "%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.set_level(os.environ.get("FLEXKV_LOG_LEVEL", "INFO"))
    return logger


flexkv_logger = _make_logger()
