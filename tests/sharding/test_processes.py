"""Two real processes on this machine, of two devices each, train one model."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import processes

TESTS = pathlib.Path(__file__).parent.parent
STEPS = 40


def start(folder, workdir, devices, *arguments):
    """A process of the tiny run on so many virtual devices."""
    path = folder / "tiny_processes.py"
    path.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {str(TESTS)!r})\nimport tiny\n"
        f"def get_config():\n    return tiny.tiny_file_config(pathlib.Path({str(folder)!r}), "
        f"steps={STEPS}, mesh__fsdp=2, objective='dpo')\n"
    )
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "focusdpo_jax.main",
            f"--config={path}",
            f"--workdir={workdir}",
            *arguments,
        ],
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_both(folder, workdir):
    """Two processes that find each other at a port which is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        start(
            folder,
            workdir,
            2,
            f"--coordinator=localhost:{port}",
            "--processes=2",
            f"--process={index}",
        )
        for index in range(2)
    ]


def logged(workdir):
    """Number of steps that a run has logged."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_two_processes_train_like_one_and_survive_the_loss_of_one(tiny_folder, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    process = start(tiny_folder, alone, 4)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-3000:]

    # One of two is killed: the other ends soon with the reason.
    first, second = start_both(tiny_folder, both)
    while logged(both) < 5 and first.poll() is None:
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    errors = first.communicate(timeout=120)[1]
    second.communicate()
    assert time.monotonic() - killed < 60 and first.returncode == processes.LOST
    assert "error: another process of this run has ended; start all of them again" in errors

    again = start_both(tiny_folder, both)
    errors = [process.communicate(timeout=300)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], errors[0][-3000:]
    assert "resumed at step " in errors[0]

    expected, losses = tiny.losses(alone), tiny.losses(both)
    assert expected.keys() == losses.keys() and len(losses) == STEPS
    for step, loss in expected.items():
        assert abs(losses[step] - loss) < 1e-5 * max(abs(loss), 1), step
    expected, found = (load_file(w / "model" / "unet.safetensors") for w in (alone, both))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_incomplete_flags_are_refused():
    with pytest.raises(UserError, match="--process missing: give all of --coordinator, "):
        processes.initialize("localhost:1", 2)


def test_a_single_process_is_not_distributed(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.initialize()
    assert processes.is_first() and processes.broadcast_from_first(3) == 3
