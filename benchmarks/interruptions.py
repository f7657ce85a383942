r"""Kills commands that make data at random moments and repeats them: is the result the same?

    python benchmarks/interruptions.py --output=runs/interruptions --kills=12

Each command of `COMMANDS` runs once undisturbed. Then it is started, ended by `kill -9` when its
folder has changed a random number of times, and started again, until it comes to its end; then all
files are compared with the undisturbed ones, byte by byte, and the next round begins, until there
were enough kills.
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
    """What is killed.

    Attributes:
      arguments: (folder of what all share, folder of this round) -> arguments of python -m.
      result: folder in the round's folder whose files are compared.
      before: commands whose finished results lie in the round's folder when it begins.
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
    """A manifest of Toybox scenes with its pictures, and one of the chosen ones of some."""
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
    """The command as a process group of its own, so that its workers die with it."""
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


def names(folder: pathlib.Path):
    """Paths of all that lies in a folder."""
    return {
        os.path.join(where, name)
        for where, folders, files in os.walk(folder)
        for name in [*folders, *files]
    }


def watch(process: subprocess.Popen, folder: pathlib.Path, until=float("inf")):
    """Waits for the end of a process, or until its folder has changed so often.

    Returns:
      How often it has changed.
    """
    changes, seen = 0, names(folder)
    while process.poll() is None and changes < until:
        now = names(folder)
        changes += now != seen
        seen = now
        time.sleep(0.002)
    return changes


def finish(process: subprocess.Popen) -> None:
    """Raises SystemExit unless a process has ended well."""
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the command failed:\n{errors[-3000:]}")


def contents(folder: pathlib.Path):
    """{path: bytes} of a folder's files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def disturb(name: str, shared, changes, kills: int, draw):
    """Kills a command until there were enough kills; returns whether the result was always right.

    Args:
      changes: how often the undisturbed command changed its folder.
    """
    command, done, rounds, equal, total = COMMANDS[name], 0, 0, 0, 0
    expected = contents(shared / f"calm {name}" / command.result)
    round_ = shared / "killed"
    while done < kills or round_.exists():
        if not round_.exists():
            begin(command, shared, round_)
        process = start(command.arguments(shared, round_), shared)
        until = draw.randint(1, changes) if done < kills else float("inf")
        watch(process, round_ / command.result, until)
        if process.poll() is None:
            time.sleep(draw.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done += 1
            continue
        finish(process)
        found = contents(round_ / command.result)
        rounds += 1
        total += len(expected.keys() | found.keys())
        equal += sum(found.get(path) == content for path, content in expected.items())
        shutil.rmtree(round_)
    print(
        f"{name}: {done} kills in {rounds} rounds; {equal} of {total} files byte-identical",
        flush=True,
    )
    return equal == total


def begin(command: Any, shared, round_) -> None:
    """Makes a round's folder, with what the commands before have left in it."""
    round_.mkdir()
    for other in command.before:
        result = COMMANDS[other].result
        shutil.copytree(shared / f"calm {other}" / result, round_ / result)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/interruptions"),
        help="folder for all there is; emptied first",
    )
    parser.add_argument("--kills", type=int, default=12, help="of each command, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--commands",
        nargs="+",
        default=list(COMMANDS),
        choices=list(COMMANDS),
        help="one needs those that make what it reads",
    )
    options = parser.parse_args()
    shared, draw, good = options.output.resolve(), random.Random(options.seed), True
    shutil.rmtree(shared, ignore_errors=True)
    write_pairs(shared / "source")
    for name in options.commands:
        command = COMMANDS[name]
        calm = shared / f"calm {name}"
        begin(command, shared, calm)
        process = start(command.arguments(shared, calm), shared)
        changes = watch(process, calm / command.result)
        finish(process)
        good &= disturb(name, shared, changes, options.kills, draw)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
