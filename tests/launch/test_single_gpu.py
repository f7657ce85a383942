"""launch/single_gpu.sh: what it installs and runs."""

import pytest

from tests.launch.stand_ins import (
    FLAG,
    ROOT,
    assert_fails,
    calls,
    launch,
    printed_calls,
    venv,
)


def test_single_gpu_install(fake):
    result = launch(
        fake,
        "single_gpu.sh",
        "install",
        "--dry-run",
        VENV="my venv",
        PYTHON="python9",
        JAX_EXTRA="cuda13",
    )
    assert (result.returncode, result.stderr) == (0, "")
    folder = f"{fake}/my venv"
    assert result.stdout == (
        f"python9 -m venv '{folder}'\n'{folder}/bin/python' -m pip install "
        f"-e {ROOT} 'jax[cuda13]'\n"
    )


def test_single_gpu_run(fake):
    variables = dict(WORKDIR="my run", GPU="1", VENV=venv(fake))
    printed = launch(fake, "single_gpu.sh", "run", "--dry-run", FLAG, **variables)
    line = [
        "python",
        "-m",
        "focusdpo_jax.main",
        "--config=configs/toybox_dpo.py",
        f"--workdir={fake}/my run",
        FLAG,
    ]
    assert printed_calls(fake, printed) == [line]
    assert_uses_gpu_1(fake)
    assert launch(fake, "single_gpu.sh", "run", FLAG, **variables).returncode == 0
    assert calls(fake) == [line, line]
    assert_uses_gpu_1(fake)


def assert_uses_gpu_1(fake):
    environ = (fake / "env").read_text().splitlines()
    assert {"CUDA_VISIBLE_DEVICES=1", "JAX_PLATFORMS=cuda,cpu"} <= set(environ)
    assert environ[-1] == str(ROOT)  # The working folder.
    (fake / "env").unlink()


@pytest.mark.parametrize(
    "arguments, variables, parts",
    [
        ([], {}, ["no subcommand: give install or run"]),
        (["train"], {}, ["train is no subcommand"]),
        (["install", "--x"], {}, ["install takes no flags: --x"]),
        (["run"], {"GPU": "0,1"}, ["GPU = 0,1", "launch/slurm.sh"]),
        (["run"], {"VENV": "/nowhere"}, ["VENV = /nowhere", "launch/single_gpu.sh install"]),
        (["install"], {"JAX_EXTRA": "rocm"}, ["JAX_EXTRA = rocm", "cuda12 or cuda13"]),
        (["install"], {"PYTHON": "python9"}, ["PYTHON = python9", "Python >= 3.11"]),
    ],
)
def test_single_gpu_mistakes(fake, arguments, variables, parts):
    assert_fails(launch(fake, "single_gpu.sh", *arguments, **variables), *parts)
    assert calls(fake) == []
