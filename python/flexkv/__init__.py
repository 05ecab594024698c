"""FlexKV: a cache of KV blocks beyond GPU memory, for LLM serving engines.

This is libflexkv's C API as Python objects. The adapters for engines are in flexkv.integration; nothing here
imports torch or numpy.
"""
from flexkv._flexkv import (
    OP_GET,
    OP_PREFETCH,
    OP_PUT,
    EARLY,
    PAGES_BUSY,
    Agent,
    Completion,
    Config,
    Error,
    Events,
    Match,
    Namespace,
    Node,
    Space,
    version,
)

__version__ = version()

__all__ = [
    "OP_GET",
    "OP_PREFETCH",
    "OP_PUT",
    "EARLY",
    "PAGES_BUSY",
    "Agent",
    "Completion",
    "Config",
    "Error",
    "Events",
    "Match",
    "Namespace",
    "Node",
    "Space",
    "version",
]
