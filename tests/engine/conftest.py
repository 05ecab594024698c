"""Tests against the real vLLM. They run in the environment that tools/engine-env makes, which has
vLLM and torch, with FlexKV's package in PYTHONPATH; tools/test does both."""
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def why_not() -> str:
    for module in ("vllm", "torch", "flexkv"):
        if importlib.util.find_spec(module) is None:
            return f"this Python has no {module}; run: tools/test engine"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := why_not():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
