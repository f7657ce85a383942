"""Seconds from the start of the command to the end of the first optimiser step.

    python benchmarks/cold_start.py                                    # Toybox
    python benchmarks/cold_start.py --config=configs/sdxl_dpo.py:debug

Each start is a separate process, `python -m focusdpo_jax.main`, which logs every step and is killed
after the first one:

  cold     no data set, no encoded pairs, no compiled programs
  again    a new run folder; data set, encoded pairs and compiled programs are cached
  resumed  the previous run, from its checkpoint of step 1

Also printed is the number of programs, and how many of them were found in the compilation cache.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

LIMIT = 1800  # Seconds until a start counts as failed.


def first_step(config: Any, folder: pathlib.Path, workdir: str):
    """Starts a run and kills it after its first step.

    Returns:
      Seconds to the first step, number of programs, and number of programs from the cache.
    """
    metrics, log = folder / workdir / "metrics.jsonl", folder / f"{workdir}.log"
    metrics.unlink(missing_ok=True)  # Lines of the previous start would count as steps.
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
            raise SystemExit(f"no step was logged:\n{log.read_text()[-2000:]}")
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
    """Measures the three starts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/toybox_dpo.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, workdir in ("cold", "first"), ("again", "second"), ("resumed", "second"):
            seconds, compiled, cached = first_step(arguments.config, folder, workdir)
            print(
                f"{name:8s} {seconds:6.1f} s to the first step; {compiled} programs, of which "
                f"{cached} were in the cache",
                flush=True,
            )


if __name__ == "__main__":
    main()
