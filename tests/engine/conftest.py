"""Tests against the real vLLM. They run in the environment that tools/engine-env makes, which has
vLLM and torch, with FlexKV's package in PYTHONPATH; tools/test does both."""
import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# An engine takes half a minute to start. These repeat with the other connector, mode or model what
# the rest has shown; `make test` leaves them out, `make test-engine` runs all.
LONG = (
    "test_hits[1-", "test_conversations[upstream]", "test_ssd_and_restart[ours]",
    "test_failed_loads_recompute[1-upstream]", "test_failed_loads_recompute[0-ours]",
    "test_failed_loads_fail", "test_preemption[upstream]", "test_one_process[ours]",
    "test_mla[upstream]", "test_sliding_window_failures", "test_engines_share_a_daemon",
    "test_replicas_share_a_daemon",
    "test_parallel[gqa-tensor-upstream]", "test_parallel[gqa-pipeline-", "test_parallel[mla-",
    "test_cpu_tier[2-", "test_failing_ssd[fail-", "test_example",
    "test_the_router_knows_what_is_there[2-", "test_with_ssd[upstream", "test_four_nodes",
)


def why_not() -> str:
    for module in ("vllm", "torch", "flexkv"):
        if importlib.util.find_spec(module) is None:
            return f"this Python has no {module}; run: tools/test engine"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("FLEXKV_ENGINE_TESTS") != "all":
        left = [i for i in items if HERE in i.path.parents and i.name.startswith(LONG)]
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if i not in left]
    if reason := why_not():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
