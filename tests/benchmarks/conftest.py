"""Benchmarks are scripts in a folder of their own; tests import them from there."""

import importlib
import sys

import pytest
import tiny


@pytest.fixture(scope="module")
def import_benchmark():
    """From a benchmark's name to its module."""
    sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(tiny.ROOT / "benchmarks"))
