"""The program of another commit is estimated as by the plan of that commit."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
ARGUMENTS = ("--config=configs/sdxl_dpo.py:debug", "--topology=v5e:2x2", "--config.batch_size=4")


def printed(*command):
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.slow
def test_the_checked_out_commit_is_estimated_as_by_its_own_plan():
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    other = printed("benchmarks/plan_at_commit.py", "--commit=HEAD", "--", *ARGUMENTS)
    own = printed("-m", "focusdpo_jax.plan", "--quick", "--json", *ARGUMENTS)
    assert other["estimate"] == own["programs"]["update"]["estimate"]
    worktrees = subprocess.run(
        ["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(worktrees.stdout.splitlines()) == 1


def test_a_commit_is_required():
    run = subprocess.run(
        [sys.executable, "benchmarks/plan_at_commit.py", "--", *ARGUMENTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "--commit: give the commit to plan" in run.stderr
