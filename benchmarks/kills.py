r"""Kills a run at random moments: does it end as if nobody had?

    python benchmarks/kills.py --output=runs/kills --kills=25

A small run on Toybox trains once undisturbed. Then the same run is started again and again and
ended by `kill -9` at random moments, every other time while it is writing a checkpoint, and at last
left alone. Its losses and the bytes of its model must be those of the undisturbed run.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

SETTINGS = {
    "steps": 120,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 10**6,
    "decay": "constant",
    "data.train_size": 16,
    "data.validation_size": 2,
    "data.test_size": 2,
    "evaluation.scenes": 0,
    "evaluation.pictures": 1,
    "evaluation.batch_size": 4,
    "sampling.steps": 1,
}


def start(output: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """A process of the run, with compiled programs and data shared by all of them."""
    overrides = SETTINGS | {"data.path": str(output / "data")}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(output / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "focusdpo_jax.main",
            "--config=configs/toybox_dpo.py",
            f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in overrides.items()),
        ],
        env=os.environ | cache,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def logged(workdir: pathlib.Path):
    """{step: loss} of what a run has logged so far."""
    path, losses = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # Half a line of the killed.
        losses[values["step"]] = values["loss"]
    return losses


def saving(workdir: pathlib.Path):
    """Whether a checkpoint is being written: Orbax writes under a temporary name."""
    folder = workdir / "checkpoints"
    try:
        return any(not path.name.isdigit() for path in folder.iterdir())
    except OSError:
        return False


def kill(process: subprocess.Popen, workdir: pathlib.Path, draw, while_saving):
    """Ends a process at a random moment of its steps; returns the step, or None if it was done."""
    before, start = len(logged(workdir)), time.monotonic()
    wanted = before + draw.randint(1, 4)
    while process.poll() is None:
        steps = len(logged(workdir))
        # A resumed run begins with the lines up to its checkpoint.
        if steps >= wanted and (not while_saving or saving(workdir)):
            break
        if time.monotonic() - start > 300:
            raise SystemExit("no progress for five minutes")
        time.sleep(0.001)
    if process.poll() is not None:
        return None
    time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return max(logged(workdir), default=0)


def finish(process: subprocess.Popen) -> None:
    """Waits for the end of a run that nobody kills."""
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors[-3000:]}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/kills"),
        help="folder of the runs; emptied first",
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    output, draw = options.output.resolve(), random.Random(options.seed)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    calm, killed = output / "calm", output / "killed"

    finish(start(output, calm))
    done = in_saves = 0
    while done < options.kills:
        while_saving = done % 2 == 0
        step = kill(start(output, killed), killed, draw, while_saving)
        if step is None:
            print(f"the run was done after {done} kills", flush=True)
            break
        done += 1
        in_saves += saving(killed)
        print(
            f"kill {done}: after step {step}"
            f"{', a checkpoint half written' if saving(killed) else ''}",
            flush=True,
        )
    finish(start(output, killed))

    losses, expected = logged(killed), logged(calm)
    equal = sum(losses.get(step) == loss for step, loss in expected.items())
    files = sorted(path.name for path in (calm / "model").glob("*.safetensors"))
    same = [
        name
        for name in files
        if (calm / "model" / name).read_bytes() == (killed / "model" / name).read_bytes()
    ]
    print(
        f"{done} kills, {in_saves} of them while a checkpoint was being written; "
        f"{equal} of {len(expected)} losses equal; "
        f"{len(same)} of {len(files)} parameter files bit-identical"
    )
    if equal != len(expected) or same != files:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
