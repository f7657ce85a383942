r"""Memory and losses of training with encoders in every step and with cached encodings.

    python benchmarks/cache_memory.py --output=runs/cache_memory

A model whose encoders are much larger than its other parts trains on the pairs of docs/examples in
three runs: images are encoded in every step, are encoded once at the start, or are already encoded.
No run generates images. The runs use a CPU, where host memory holds all arrays.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import benchmark_cases

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {
    "objective": "dpo",
    "steps": 10,
    "batch_size": 2,
    "log_every": 1,
    "checkpoint_every": 10,
    "data.source": "prepared",
    "evaluation.pictures": 0,
    "evaluation.batch_size": 2,
}


def make_model(folder: pathlib.Path) -> tuple[int, int]:
    """Writes Toybox's generator with random encoders of 0.1 billion parameters.

    Returns:
      Bytes of its encoders and of its other parts.
    """
    from focusdpo_jax.training import models

    sizes = json.loads((models.shipped("toybox") / "model.json").read_text())
    wide = {"hidden_size": 1024, "num_layers": 3, "num_heads": 16, "intermediate_size": 4096}
    sizes["text_encoder"] |= wide | {"hidden_size": 768, "num_heads": 12}
    sizes["text_encoder_2"] |= wide
    sizes["image_encoder"] |= wide
    sizes["adapter"] |= {"input_dim": 1024, "output_dim": 768 + 1024}
    sizes["unet"] |= {"cross_attention_dim": 768 + 1024}
    config = benchmark_cases.load_config("toybox_dpo", model__pretrained="", model__sizes=sizes)
    model = models.load_model(config)
    models.save_model(folder, model, model.parameters)
    bytes_ = {part: (folder / f"{part}.safetensors").stat().st_size for part in model.parameters}
    rest = bytes_["unet"] + bytes_["adapter"]
    return sum(bytes_.values()) - rest, rest


def run(
    arguments: list[str], log: pathlib.Path, metrics: pathlib.Path | None = None
) -> tuple[float | None, int]:
    """Runs a command and measures its memory.

    Args:
      arguments: of `python -m`.
      log: file for its output.
      metrics: metrics.jsonl of a run, from which the time of training is read.

    Returns:
      Bytes during training (median; None without `metrics`), and at the peak.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # Less memory for the compiler.
        "MALLOC_ARENA_MAX": "2",  # Freed memory is returned to the system.
    }
    resident_bytes = []
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            steps = len(metrics.read_text().splitlines()) if metrics and metrics.exists() else 0
            if 0 < steps < SETTINGS["steps"]:
                resident = pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]
                resident_bytes.append(int(resident) * os.sysconf("SC_PAGE_SIZE"))
            time.sleep(0.02)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")
    return statistics.median(resident_bytes) if resident_bytes else None, usage.ru_maxrss * 1024


def losses(workdir: pathlib.Path) -> list[float]:
    """Reads the loss of every step."""
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def main() -> None:
    """Trains three times and prints memory and differences of the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/cache_memory"),
        help="folder of model, data and runs; deleted at the start",
    )
    output = parser.parse_args().output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    (output / "model").mkdir(parents=True)
    encoders, rest = make_model(output / "model")
    print(
        f"encoders {encoders / 2**20:.0f} MiB, UNet and adapter {rest / 2**20:.0f} MiB", flush=True
    )
    run(
        [
            "focusdpo_jax.prepare",
            f"--output={output / 'data'}",
            "--resolution=64",
            "--manifest=docs/examples/pairs/manifest.jsonl",
        ],
        output / "prepare.log",
    )
    losses_by_run = {}
    for name, cache in (("in every step", False), ("encoded once", True), ("found encoded", True)):
        workdir = output / name.replace(" ", "_")
        settings = SETTINGS | {
            "data.cache": cache,
            "data.path": output / "data",
            "model.pretrained": output / "model",
        }
        training, peak = run(
            [
                "focusdpo_jax.main",
                "--config=configs/toybox_dpo.py",
                f"--workdir={workdir}",
                *(f"--config.{k}={v}" for k, v in settings.items()),
            ],
            output / f"{workdir.name}.log",
            workdir / "metrics.jsonl",
        )
        assert training is not None, "no sample of memory was taken during training"
        losses_by_run[name] = losses(workdir)
        print(
            f"{name:15} {training / 2**20:5.0f} MiB during training, {peak / 2**20:5.0f} MiB at "
            "the peak",
            flush=True,
        )
    expected = losses_by_run.pop("in every step")
    for name, values in losses_by_run.items():
        worst = max(abs(a / b - 1) for a, b in zip(values, expected, strict=True))
        print(f"{name:15} losses of {len(values)} steps differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
