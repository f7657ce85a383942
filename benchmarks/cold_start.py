"""Seconds from the command to the end of the first optimiser step: cold, again, and resumed.

    python benchmarks/cold_start.py                                    # Toybox
    python benchmarks/cold_start.py --config=configs/sdxl_dpo.py:debug

Each start is a process of its own, `python -m focusdpo_jax.main`, that is ended after its first logged
step, with a step logged every time:

  cold     no data set, no encoded pairs, no compiled program
  again    another run folder; data set, encoded pairs and compiled programs are there
  resumed  the run before, from its checkpoint of step 1

Also printed is how many programs were compiled, and how many were found in the cache.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

LIMIT = 1800


def first_step(config: Any, folder: pathlib.Path, workdir: str):
    """Starts a run and ends it after its first step; returns seconds and counts."""
    metrics, log = folder / workdir / "metrics.jsonl", folder / f"{workdir}.log"
    metrics.unlink(missing_ok=True)  # Steps behind the checkpoint are no step of the next start.
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_LOG_COMPILES": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "focusdpo_jax.main",
                f"--config={config}",
                f"--workdir={folder / workdir}",
                f"--config.data.path={folder / 'data'}",
                "--config.log_every=1",
                "--config.checkpoint_every=1",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    while not (metrics.exists() and "\n" in metrics.read_text()):
        if process.poll() is not None or time.monotonic() - start > LIMIT:
            process.kill()
            raise SystemExit(f"no step was made:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)
    seconds = time.monotonic() - start
    checkpoint = folder / workdir / "checkpoints" / "1"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    text = log.read_text()
    return (
        seconds,
        text.count("Finished XLA compilation of"),
        text.count("Persistent compilation cache hit"),
    )


def main() -> None:
    """Starts three times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/toybox_dpo.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, workdir in ("cold", "first"), ("again", "second"), ("resumed", "second"):
            seconds, compiled, found = first_step(arguments.config, folder, workdir)
            print(
                f"{name:8s} {seconds:6.1f} s to the first step; {compiled} programs, of which "
                f"{found} were in the cache",
                flush=True,
            )


if __name__ == "__main__":
    main()
