r"""Kills a run at random moments and checks that its result does not change.

    python benchmarks/kills.py --output=runs/kills --kills=25

A small run on Toybox trains once undisturbed. A second, equal run is started repeatedly and killed
with `kill -9` at random moments, every other time while it writes a checkpoint. At last it runs to
its end. Its losses and model files must be identical to those of the undisturbed run.
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
    """Starts the run; all processes share compiled programs and data."""
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
    """Losses that a run has logged so far, {step: loss}."""
    path, losses = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # An incomplete line of a killed process.
        losses[values["step"]] = values["loss"]
    return losses


def saving(workdir: pathlib.Path):
    """Whether a checkpoint is being written, which Orbax does under a temporary name."""
    folder = workdir / "checkpoints"
    try:
        return any(not path.name.isdigit() for path in folder.iterdir())
    except OSError:
        return False


def kill(process: subprocess.Popen, workdir: pathlib.Path, rng, while_saving):
    """Kills a process after a random number of steps.

    Returns:
      The last logged step, or None if the run had finished.
    """
    before, start = len(logged(workdir)), time.monotonic()
    target = before + rng.randint(1, 4)
    while process.poll() is None:
        steps = len(logged(workdir))
        # A resumed run keeps the lines up to its checkpoint.
        if steps >= target and (not while_saving or saving(workdir)):
            break
        if time.monotonic() - start > 300:
            raise SystemExit("no progress for five minutes")
        time.sleep(0.001)
    if process.poll() is not None:
        return None
    time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return max(logged(workdir), default=0)


def finish(process: subprocess.Popen) -> None:
    """Waits for the end of a run; raises SystemExit if it failed."""
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors[-3000:]}")


def main() -> None:
    """Runs, kills and compares; exits with 1 if a loss or a file differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/kills"),
        help="folder of the runs; deleted at the start",
    )
    parser.add_argument("--kills", type=int, default=25, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    output, rng = options.output.resolve(), random.Random(options.seed)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    undisturbed, killed = output / "calm", output / "killed"

    finish(start(output, undisturbed))
    kills = kills_while_saving = 0
    while kills < options.kills:
        while_saving = kills % 2 == 0
        step = kill(start(output, killed), killed, rng, while_saving)
        if step is None:
            print(f"the run finished after {kills} kills", flush=True)
            break
        kills += 1
        kills_while_saving += saving(killed)
        print(
            f"kill {kills}: after step {step}"
            f"{', a checkpoint half written' if saving(killed) else ''}",
            flush=True,
        )
    finish(start(output, killed))

    losses, expected = logged(killed), logged(undisturbed)
    equal = sum(losses.get(step) == loss for step, loss in expected.items())
    files = sorted(path.name for path in (undisturbed / "model").glob("*.safetensors"))
    identical = [
        name
        for name in files
        if (undisturbed / "model" / name).read_bytes() == (killed / "model" / name).read_bytes()
    ]
    print(
        f"{kills} kills, {kills_while_saving} of them while a checkpoint was being written; "
        f"{equal} of {len(expected)} losses equal; "
        f"{len(identical)} of {len(files)} parameter files bit-identical"
    )
    if equal != len(expected) or identical != files:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
