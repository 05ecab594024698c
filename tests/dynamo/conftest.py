"""Tests with the real Dynamo: its front end, router, relay and, in test_workers.py, dynamo.vllm. They
run in the environment that tools/dynamo-env --vllm makes, with FlexKV's package in PYTHONPATH;
tools/test does both."""
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "dynamo"))


def why_not():
    for module in ("dynamo.llm", "vllm", "flexkv._flexkv"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"this Python has no {module}; run: tools/test dynamo"
    return ""


def pytest_ignore_collect(collection_path):
    if reason := why_not():
        pytest.exit(reason, 1)


@pytest.fixture(scope="module")
def folder():
    """Short: sockets in it have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="flexkv-dynamo."))
    yield path
    shutil.rmtree(path, ignore_errors=True)

