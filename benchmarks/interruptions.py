r"""Kills commands that write data at random moments and checks that repeating them is safe.

    python benchmarks/interruptions.py --output=runs/interruptions --kills=12

Each command in `COMMANDS` runs once undisturbed. In a round, it is then started, killed with
`kill -9` after its folder has changed a random number of times, and started again, until it
finishes. All files are compared byte by byte with those of the undisturbed run. Rounds are repeated
until --kills is reached.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
PAIRS, SCENES, SIDE = 40, 12, 256


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
      arguments: (folder of the script, folder of the round) -> arguments of `python -m`.
      result: folder whose files are compared, relative to the folder of the round.
      before: commands whose results are copied to the folder of a round at its start.
    """

    arguments: Callable[[pathlib.Path, pathlib.Path], list[str]]
    result: str
    before: tuple[str, ...] = ()


COMMANDS = {
    "prepare": Command(
        lambda shared, round_: [
            "focusdpo_jax.prepare",
            f"--manifest={shared / 'source' / 'manifest.jsonl'}",
            f"--output={round_ / 'prepared'}",
            "--resolution=64",
            "--workers=2",
        ],
        "prepared",
    ),
    "cache pass": Command(
        lambda shared, round_: [
            "focusdpo_jax.main",
            "--config=configs/toybox_dpo.py",
            f"--workdir={round_ / 'run'}",
            "--config.data.source=prepared",
            f"--config.data.path={round_ / 'prepared'}",
            "--config.steps=1",
            "--config.batch_size=4",
            "--config.checkpoint_every=10",
            "--config.evaluation.pictures=0",
            "--config.evaluation.batch_size=2",
        ],
        "prepared",
        ("prepare",),
    ),
    "disrupt": Command(
        lambda shared, round_: [
            "focusdpo_jax.disrupt",
            f"--manifest={shared / 'source' / 'scenes.jsonl'}",
            f"--output={round_ / 'pairs'}",
            "--candidates=2",
            "--steps=2",
            "--strength=1",
        ],
        "pairs",
    ),
}


def write_pairs(folder: pathlib.Path) -> None:
    """Writes Toybox pairs with a manifest for `prepare`, and a manifest of scenes for `disrupt`."""
    from focusdpo_jax import toybox

    world, lines = toybox.World(resolution=SIDE), []
    folder.mkdir(parents=True)
    for i in range(PAIRS):
        record, files = world.record("train", i), {}
        for name in ("chosen", "rejected", "prior_mask"):
            files[name] = record[name]
        subjects = []
        for j, subject in enumerate(record["subjects"]):
            names = {
                name: f"{i}_{j}_{name}.png" for name in ("reference", "reference_mask", "mask")
            }
            subjects.append({"phrase": subject["phrase"], **names})
            files |= {f"{j}_{name}": subject[name] for name in names}
        for name, pixels in files.items():
            Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels).save(
                folder / f"{i}_{name}.png"
            )
        lines.append(
            {"caption": record["caption"], "subjects": subjects}
            | {name: f"{i}_{name}.png" for name in ("chosen", "rejected", "prior_mask")}
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scenes = [
        {name: line[name] for name in ("caption", "chosen", "subjects")} for line in lines[:SCENES]
    ]
    (folder / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scenes))


def start(arguments, shared):
    """Starts a command in a new process group, so that its workers can be killed with it."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def paths_in(folder: pathlib.Path):
    """Paths of all files and folders in a folder."""
    return {
        os.path.join(where, name)
        for where, folders, files in os.walk(folder)
        for name in [*folders, *files]
    }


def watch(process: subprocess.Popen, folder: pathlib.Path, max_changes=float("inf")):
    """Waits until a process ends or its folder has changed `max_changes` times.

    Returns:
      Number of changes.
    """
    changes, before = 0, paths_in(folder)
    while process.poll() is None and changes < max_changes:
        after = paths_in(folder)
        changes += after != before
        before = after
        time.sleep(0.002)
    return changes


def finish(process: subprocess.Popen) -> None:
    """Waits for the end of a process; raises SystemExit if it failed."""
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the command failed:\n{errors[-3000:]}")


def contents(folder: pathlib.Path):
    """Contents of all files in a folder, {path: bytes}."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_and_repeat(name: str, shared, changes, kills: int, rng):
    """Repeats rounds of a command until it was killed `kills` times.

    Args:
      name: of the command.
      shared: folder of the script.
      changes: number of changes of the folder in the undisturbed run.
      kills: least number of kills.
      rng: random.Random.

    Returns:
      Whether all files of all rounds are identical to those of the undisturbed run.
    """
    command, killed, rounds, equal, total = COMMANDS[name], 0, 0, 0, 0
    expected = contents(shared / f"calm {name}" / command.result)
    round_ = shared / "killed"
    while killed < kills or round_.exists():
        if not round_.exists():
            start_round(command, shared, round_)
        process = start(command.arguments(shared, round_), shared)
        max_changes = rng.randint(1, changes) if killed < kills else float("inf")
        watch(process, round_ / command.result, max_changes)
        if process.poll() is None:
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        finish(process)
        actual = contents(round_ / command.result)
        rounds += 1
        total += len(expected.keys() | actual.keys())
        equal += sum(actual.get(path) == content for path, content in expected.items())
        shutil.rmtree(round_)
    print(
        f"{name}: {killed} kills in {rounds} rounds; {equal} of {total} files byte-identical",
        flush=True,
    )
    return equal == total


def start_round(command: Any, shared, round_) -> None:
    """Creates the folder of a round, with the results of the commands before."""
    round_.mkdir()
    for other in command.before:
        result = COMMANDS[other].result
        shutil.copytree(shared / f"calm {other}" / result, round_ / result)


def main() -> None:
    """Runs, kills and compares each command; exits with 1 if a file differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/interruptions"),
        help="folder of all files; deleted at the start",
    )
    parser.add_argument(
        "--kills", type=int, default=12, help="least number of kills of each command"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--commands",
        nargs="+",
        default=list(COMMANDS),
        choices=list(COMMANDS),
        help="commands to kill; a command needs those whose results it reads",
    )
    options = parser.parse_args()
    shared, rng, identical = options.output.resolve(), random.Random(options.seed), True
    shutil.rmtree(shared, ignore_errors=True)
    write_pairs(shared / "source")
    for name in options.commands:
        command = COMMANDS[name]
        undisturbed = shared / f"calm {name}"
        start_round(command, shared, undisturbed)
        process = start(command.arguments(shared, undisturbed), shared)
        changes = watch(process, undisturbed / command.result)
        finish(process)
        identical &= kill_and_repeat(name, shared, changes, options.kills, rng)
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
