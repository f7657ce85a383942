"""The benchmark that compares UNets at their real size, on a tiny model."""

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("diffusers", reason="parity is checked against diffusers")

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "full_size_parity.py"


def test_the_script(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--small", f"--folder={tmp_path}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for name in ("diffusers: make and write", "focusdpo_jax: read"):
        assert re.search(rf"{name} .* run [\d.]+ s; peak \d\.\d\d GB", result.stdout), result.stdout
    error = float(re.search(r"relative error of the output: (\S+)", result.stdout)[1])
    assert 0 < error < 1e-5
    assert not list(tmp_path.iterdir())
