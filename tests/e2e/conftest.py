"""Markers of the end-to-end tests. tools/test runs those of a marker by it, so a new one needs nothing but the marker."""
import os

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "bucket: needs a real S3 server and NIXL; `tools/test s3` has both and runs these alone")


def pytest_runtest_setup(item):
    if item.get_closest_marker("bucket") and not os.environ.get("FLEXKV_TEST_S3"):
        pytest.skip("the stage s3 runs it")
