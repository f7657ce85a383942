"""Checks that a change of the code leaves all values of a run exactly equal.

    git worktree add ../before COMMIT
    python benchmarks/unchanged.py --before=../before            # 20 steps of two configurations
    python benchmarks/unchanged.py --before=../before --default  # and the whole default run
    python benchmarks/unchanged.py --repeat=FOLDER               # a run of an older version

With --before, runs the same commands in both checkouts, one after the other. Compares
`metrics.jsonl` without throughput, `results.json` without settings, and the record of
`step_cost.py`. Runs of a commit are kept in --output and reused; those of a checkout with
uncommitted changes are repeated. Every checkout renders and encodes its own data.

With --repeat, repeats a finished run with the configuration that it was started with, since files
of `configs/` may have changed since. --pretrained replaces its model.

The exit status is 1 if a value differs.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
SPEEDS = ("pairs_per_second", "teraflops_per_device", "utilisation")
SHORT = ("steps=20", "log_every=1", "sample_every=0", "checkpoint_every=0")
RUNS = {
    "toybox_dpo": ("configs/toybox_dpo.py", *SHORT, "evaluation.scenes=0", "evaluation.pictures=0"),
    "sdxl_debug": ("configs/sdxl_dpo.py:debug", *SHORT, "evaluation.pictures=0"),
}
DEFAULT = {"default": ("configs/toybox_dpo.py",)}


def commit(checkout: pathlib.Path) -> str | None:
    """The commit of a checkout, or None if it has uncommitted changes."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if changed else git("rev-parse", "--short=10", "HEAD")


def run(
    checkout: pathlib.Path, name: str, config: str, fields: Iterable[str], output: pathlib.Path
) -> pathlib.Path:
    """Runs a configuration in a checkout, unless this was done before; returns the run's folder."""
    revision = commit(checkout)
    folder = output / (revision or "changed") / name
    if (folder / "done").exists() and revision:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "focusdpo_jax.main", f"--config={config}"]
    command += [
        f"--workdir={folder.absolute()}",
        f"--config.data.path={(folder / 'data').absolute()}",
    ]
    command += [f"--config.{field}" for field in fields]
    print(f"{revision or checkout}: {' '.join(command[1:4])}", flush=True)
    with (folder / "log.txt").open("w") as log:
        subprocess.run(
            command,
            cwd=checkout,
            check=True,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(checkout).absolute())},
        )
    (folder / "done").touch()
    return folder


def read_values(folder: pathlib.Path) -> Any:
    """All values that a run has written, {name: value}."""
    recorded = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        step = metrics.pop("step")
        recorded |= {f"step {step}: {k}": v for k, v in metrics.items() if k not in SPEEDS}
    results = folder / "results.json"
    if results.exists():
        for measure, sides in json.loads(results.read_text())["metrics"].items():
            recorded |= {f"{measure} of {side}": value for side, value in sides.items()}
    return recorded


def repeat(folder: pathlib.Path, output: pathlib.Path, pretrained: str | None) -> Any:
    """Repeats a finished run with its own configuration; returns its values."""
    from focusdpo_jax import config as config_lib
    from focusdpo_jax.training import loop

    config = config_lib.parse_saved(json.loads((folder / "config.json").read_text()))
    repeated = output / "repeated" / folder.name
    shutil.rmtree(repeated, ignore_errors=True)
    # Encodings are stored with the data; those of the older version would hide a change.
    changes: dict[str, Any] = {"data.path": str((repeated / "data").absolute())}
    if pretrained:
        changes["model.pretrained"] = pretrained
    loop.run(config_lib.replace(config, changes), repeated)
    return read_values(repeated)


def compare(name: str, old: Any, new: Any) -> int:
    """Prints the values that differ; returns their number."""
    changed_names = [key for key in old | new if old.get(key) != new.get(key)]
    print(f"{name}: {len(old)} numbers, {len(changed_names)} differ")
    for key in changed_names[:10]:
        print(f"  {key}: {old.get(key)} -> {new.get(key)}")
    return len(changed_names)


def main() -> None:
    """Compares each run, prints differences and exits with 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", help="checkout to compare with")
    parser.add_argument("--repeat", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--pretrained", help="model of the repeated run")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/unchanged"))
    parser.add_argument("--default", action="store_true", help="also compare the whole default run")
    arguments = parser.parse_args()
    if (arguments.before is None) == (arguments.repeat is None):
        parser.error("give either --before or --repeat")
    different = 0
    if arguments.repeat:
        new = repeat(arguments.repeat, arguments.output, arguments.pretrained)
        sys.exit(bool(compare(arguments.repeat.name, read_values(arguments.repeat), new)))
    for name, (config, *fields) in (RUNS | (DEFAULT if arguments.default else {})).items():
        old, new = (
            read_values(run(checkout, name, config, fields, arguments.output))
            for checkout in (arguments.before, ROOT)
        )
        different += compare(name, old, new)
    record = pathlib.Path("benchmarks/step_cost.json")
    if (pathlib.Path(arguments.before) / record).read_text() != (ROOT / record).read_text():
        print("step_cost.json differs")
        different += 1
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
