"""launch/slurm.sh: what it submits, and what the batch script does at each signal."""

import os
import signal
import subprocess
import time

import pytest

from tests.launch.stand_ins import (
    FLAG,
    NOTE,
    ROOT,
    assert_fails,
    calls,
    environment,
    launch,
    printed_calls,
    venv,
    wait_for,
)

SLURM = {"WORKDIR": "/shared/my run", "NODES": "2", "GPUS_PER_NODE": "4", "PARTITION": "gpu"}
SBATCH = [
    "sbatch",
    "--job-name=focusdpo",
    "--nodes=2",
    "--ntasks-per-node=4",
    "--gres=gpu:4",
    "--cpus-per-task=8",
    "--time=24:00:00",
    "--requeue",
    "--signal=B:USR1@180",
    "--open-mode=append",
    "--output=focusdpo-%j.log",
    "--partition=gpu",
]
SRUN_CALL = [
    "srun",
    "--kill-on-bad-exit=0",
    "--wait=600",
    "--cpus-per-task=8",
    "python",
    "-m",
    "focusdpo_jax.main",
    "--config=configs/toybox_dpo.py",
    "--workdir=/shared/my run",
    FLAG,
]


def test_slurm_dry_run_is_what_is_submitted(fake):
    result = launch(fake, "slurm.sh", FLAG, "--dry-run", **SLURM)
    assert printed_calls(fake, result) == [SBATCH]
    printed = (fake / "script").read_text()
    (fake / "calls").unlink()
    folder = venv(fake)
    result = launch(fake, "slurm.sh", FLAG, **SLURM, VENV=folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert calls(fake) == [SBATCH]
    assert (fake / "script").read_text() == printed.replace(str(ROOT / ".venv"), folder)


def test_slurm_folder_is_relative_to_where_it_is_submitted(fake):
    result = launch(fake, "slurm.sh", "--dry-run", WORKDIR="runs/dpo")
    assert f"--workdir={fake}/runs/dpo" in result.stdout


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"WORKDIR": ""}, ["WORKDIR is not set", "WORKDIR=/shared/runs/dpo"]),
        ({"NODES": "two"}, ["NODES = two", "whole number"]),
        ({"GPUS_PER_NODE": "0"}, ["GPUS_PER_NODE = 0", ">= 1"]),
        ({"VENV": "/nowhere"}, ["VENV = /nowhere", "single_gpu.sh install"]),
    ],
)
def test_slurm_mistakes(fake, changes, parts):
    assert_fails(launch(fake, "slurm.sh", **{**SLURM, **changes}), *parts)
    assert calls(fake) == []


def test_slurm_words_without_dashes_are_refused(fake):
    assert_fails(launch(fake, "slurm.sh", "run", **SLURM), "unexpected argument run")


def start_batch_script(fake):
    """Submits, and starts what was submitted, as Slurm would."""
    assert launch(fake, "slurm.sh", FLAG, **SLURM, VENV=venv(fake)).returncode == 0
    (fake / "calls").unlink()
    process = subprocess.Popen(
        ["bash", fake / "script"],
        text=True,
        stdout=subprocess.PIPE,
        env=environment(fake, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}),
    )
    wait_for((fake / "srun.pid").exists)
    assert calls(fake) == [SRUN_CALL]
    return process


def test_slurm_job_saves_and_is_queued_again_before_its_time_is_up(fake):
    process = start_batch_script(fake)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert calls(fake)[1:] == [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]
    assert process.returncode == 75
    assert "start 1 on n[1-2]\n" in output


def test_slurm_cancelled_job_waits_for_training_and_is_not_queued_again(fake):
    sleep = fake / "bin/sleep"
    sleep.write_text("#!/usr/bin/env bash\n" + NOTE)
    sleep.chmod(0o755)
    process = start_batch_script(fake)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(int((fake / "srun.pid").read_text()), signal.SIGTERM)  # Slurm signals the tasks, too.
    process.communicate(timeout=300)
    assert calls(fake)[1:] == [["sleep", "600"]]
    assert process.returncode == 75


def test_slurm_failed_job_is_not_queued_again(fake):
    (fake / "bin/srun").write_text(f"#!/usr/bin/env bash\n{NOTE}touch $FAKE/srun.pid; exit 3\n")
    process = start_batch_script(fake)
    process.communicate(timeout=300)
    assert process.returncode == 3
    assert calls(fake) == [SRUN_CALL]
