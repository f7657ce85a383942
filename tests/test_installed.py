"""The wheel, installed without a checkout: its files, its configurations, its console scripts."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = (
    "focusdpo_jax",
    "configs",
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
# Fields that make the default line short.
SHORT = {
    "steps": 1,
    "batch_size": 8,
    "data.train_size": 8,
    "data.validation_size": 2,
    "data.test_size": 4,
    "evaluation.scenes": 4,
    "evaluation.batch_size": 4,
    "evaluation.pictures": 2,
    "sampling.steps": 1,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(
                path, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(path, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([*pip, *wheel, str(folder / "source")], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--no-compile", f"--target={folder / 'site'}"]
    subprocess.run([*pip, *install, str(wheel)], check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def run(site, cwd, script, *arguments):
    """Runs a console script of the wheel in a folder; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(site / "bin" / script), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_has_its_configurations_weights_and_marker_of_types(site):
    package = site / "focusdpo_jax"
    configs = {path.name for path in (package / "configs").iterdir()}
    assert configs == {path.name for path in (ROOT / "configs").glob("*.py")}
    assert (package / "py.typed").exists() and (package / "assets/toybox/unet.safetensors").exists()
    assert not (site / "configs").exists() and not (site / "tests").exists()


def test_console_scripts_parse_flags_as_the_commands_do(site, tmp_path):
    scripts = {path.name for path in (site / "bin").iterdir() if path.suffix != ".exe"}
    assert scripts == {
        f"focusdpo-{name}"
        for name in ("train", "sample", "evaluate", "export", "prepare", "disrupt", "plan")
    }
    told = run(site, tmp_path, "focusdpo-train", "--help").stdout
    assert "Trains a generator" in told and re.search(r"^ +--\[no\]accept_changes", told, re.M)
    wrong = run(site, tmp_path, "focusdpo-train", "--config=toybox_dop")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --config=toybox_dop: there is no such file. Did you mean toybox_dpo? "
        "Names that need no path: sdxl_dpo, toybox_base, toybox_dpo\n",
    )
    wrong = run(site, tmp_path, "focusdpo-sample", "--promt=a star")
    assert wrong.returncode == 2 and re.fullmatch("error: .*promt.*\n", wrong.stderr)


def test_a_configuration_is_found_by_name_with_its_argument(site, tmp_path):
    wrong = run(
        site, tmp_path, "focusdpo-plan", "--config=sdxl_dpo:debug", "--config.stepz=3", "--quick"
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: config.stepz is not a field. ")


@pytest.mark.slow
def test_the_default_line_runs(site, tmp_path):
    changes = [f"--config.{field}={value}" for field, value in SHORT.items()]
    done = run(site, tmp_path, "focusdpo-train", "--config=toybox_dpo", *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Toybox, 4 test scenes" in done.stdout
    assert {"results.json", "model", "metrics.jsonl"} <= set(
        os.listdir(tmp_path / "runs" / "toybox_dpo")
    )
