r"""Estimates the time of the update at an earlier commit, whose `plan` had no estimates.

    pip install -e ".[plan]"
    python benchmarks/plan_at_commit.py --commit=f545188 -- --config=configs/sdxl_dpo.py \
        --topology=v5e:4x4 --config.batch_size=16 --config.mesh.data=16 --config.mesh.fsdp=1

Runs that commit's `python -m focusdpo_jax.plan --quick --json` in a temporary worktree, and keeps
the text of the program that it compiles. The text is then read by the `profiling` of this checkout,
so that both commits are estimated in the same way. Prints the plan as JSON, with the values of
`planning.timing.estimate` as "estimate".
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def worktree(commit: str):
    """Yields a temporary folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def run_plan(folder: pathlib.Path, arguments) -> None:
    """Runs the `plan` of the first `focusdpo_jax` on the path, and keeps its program in `folder`.

    Writes "program.txt", the compiled program, and "flops.json", the operations of the traced one.
    """
    import jax

    # By its path, since `focusdpo_jax` is the package of the other commit here.
    spec = importlib.util.spec_from_file_location(
        "flops", ROOT / "focusdpo_jax" / "profiling" / "flops.py"
    )
    assert spec and spec.loader
    flops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flops)
    stages: Any = jax.stages
    lower, compile_ = stages.Traced.lower, stages.Lowered.compile

    def counted(traced, *positional, **named):
        (folder / "flops.json").write_text(json.dumps(flops.count(traced)._asdict()))
        return lower(traced, *positional, **named)

    def kept(lowered, *positional, **named):
        compiled = compile_(lowered, *positional, **named)
        (folder / "program.txt").write_text(compiled.as_text() or "")
        return compiled

    stages.Traced.lower, stages.Lowered.compile = counted, kept
    sys.argv = ["plan", *arguments, "--quick", "--json"]
    runpy.run_module("focusdpo_jax.plan", run_name="__main__")


def estimate(commit: str, arguments):
    """Returns the plan of a commit, with "estimate" from the `profiling` of this checkout."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    from focusdpo_jax.planning import targets, timing
    from focusdpo_jax.profiling import flops, hlo

    with worktree(commit) as checkout, tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, __file__, f"--kept={folder}", "--", *arguments],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            text=True,
        )
        if run.returncode:
            raise SystemExit(run.returncode)
        plan = json.loads(run.stdout)
        kept = pathlib.Path(folder)
        work = flops.Operations(**json.loads((kept / "flops.json").read_text()))
        text = hlo.Program((kept / "program.txt").read_text())
    _, chip = targets.devices(plan["topology"])
    return plan | {"estimate": timing.estimate(chip, plan["chips"], text, work)}


def main() -> None:
    """Prints the plan of a commit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="commit to plan")
    parser.add_argument("--kept", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("plan", nargs="+", help="arguments of `plan`, after --")
    arguments = parser.parse_args()
    if arguments.kept:
        run_plan(arguments.kept, arguments.plan)
        return
    if not arguments.commit:
        parser.error("--commit: give the commit to plan")
    print(json.dumps(estimate(arguments.commit, arguments.plan), indent=1))


if __name__ == "__main__":
    main()
