"""Real data for tests, which is not part of the project; tests are skipped without it."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(
    os.environ.get("FOCUSDPO_SHARED")
    or pathlib.Path(__file__).resolve().parents[1].parent / "shared"
)


def shared(name):
    """The path of `name` among the shared data; skips the test where it is missing."""
    path = ROOT / "data" / name
    if not path.exists():
        pytest.skip(f"no data/{name} in {ROOT}; FOCUSDPO_SHARED names another folder")
    return path
