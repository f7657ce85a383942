"""experiments/toybox_base.sh skips finished stages, stops in time and exits with the status of a failure."""

import importlib.util
import os
import pathlib
import shutil
import stat
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
# In the place of python: leaves a line and what the stage would leave.
PYTHON = """#!/bin/bash
echo "$*" >> calls
stage=${3##*:}
case $stage in
    *"$FAILS"*) exit 3;;
    *"$HANGS"*) trap 'exit 143' TERM; sleep 60 & wait;;
esac
mkdir -p runs/toybox_base_$stage/model && touch runs/toybox_base_$stage/model/model.json
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "toybox_base.sh", tmp_path / "experiments")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def run(*arguments, fails="none", hangs="none"):
        environment = os.environ | {
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "FAILS": fails,
            "HANGS": hangs,
        }
        (tmp_path / "calls").write_text("")
        status = subprocess.run(
            ["bash", tmp_path / "experiments" / "toybox_base.sh", *arguments],
            env=environment,
            timeout=30,
            stdout=subprocess.DEVNULL,
        ).returncode
        return status, (tmp_path / "calls").read_text().splitlines()

    return run


def test_stages_follow_each_other_and_finished_ones_are_skipped(recipe):
    status, calls = recipe("--config.seed=1", fails="probe")
    assert status == 3 and len(calls) == 3
    assert calls[0] == (
        "-m focusdpo_jax.main --config=configs/toybox_base.py:autoencoder "
        "--workdir=runs/toybox_base_autoencoder --config.seed=1"
    )
    status, calls = recipe()
    assert status == 0 and "probe" in calls[0] and len(calls) == len(stages()) - 2
    assert recipe() == (0, [])


def test_it_saves_and_stops_in_time(recipe):
    status, calls = recipe("2", hangs="image_encoder")
    assert status == 0 and len(calls) == 2


def stages():
    """The stages of configs/toybox_base.py."""
    spec = importlib.util.spec_from_file_location(
        "toybox_base", ROOT / "configs" / "toybox_base.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STAGES
