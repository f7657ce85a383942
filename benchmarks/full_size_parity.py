"""Compares SDXL's UNet at full size with diffusers': error, memory and time.

    python benchmarks/full_size_parity.py [--small] [--folder=DIR]

The model has 2.57 billion random parameters in float32, the latents have 64 x 64 positions (512
pixels). Two processes run one after the other, so that memory holds one copy of the weights. The
first creates the model in diffusers, writes it as safetensors (10.3 GB in DIR, removed at the end)
and runs it. The second reads these files with our streaming loader and runs our model on the same
inputs. Each should need at most 16 GB. `--small` tests the script with 0.2 million parameters.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from focusdpo_jax.checkpoints import diffusers_configs, diffusers_folder  # noqa: E402
from focusdpo_jax.models.unet import UNet, UNetConfig  # noqa: E402

FULL, FULL_SIDE = UNetConfig(), 64
SMALL_SIDE = 12
SMALL = UNetConfig(
    block_out_channels=(16, 24, 32),
    transformer_layers_per_block=(0, 1, 2),
    mid_transformer_layers=2,
    layers_per_block=1,
    num_heads=(2, 3, 4),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
    pooled_dim=20,
    norm_groups=8,
)
OUTPUT, RESULT = "output_{}.npy", "result_{}.json"


def inputs(config: Any, side: int) -> dict[str, np.ndarray]:
    """Random arguments of the UNet for one image, with latents of `side` x `side`."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return dict(
        sample=normal(1, side, side, config.in_channels),
        timesteps=np.array([500], np.int32),
        text=normal(1, 77, config.cross_attention_dim),
        pooled=normal(1, config.pooled_dim),
        time_ids=np.array([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], np.float32),
    )


def theirs(folder: pathlib.Path, config: Any, side: int) -> tuple[np.ndarray, dict[str, float]]:
    """Creates, writes and runs diffusers' model; returns the output and {stage: seconds}."""
    import diffusers
    import torch

    torch.manual_seed(0)
    values = diffusers_configs.write_unet(config, side)
    start = time.monotonic()
    unet: Any = diffusers.UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
    model = unet.from_config(values).eval().requires_grad_(False)
    # Small files, since the tensors of a file are in memory twice while it is written.
    model.save_pretrained(folder / "unet", max_shard_size="1GB")
    seconds = {"make and write": time.monotonic() - start}
    batch = {name: torch.from_numpy(value) for name, value in inputs(config, side).items()}
    start = time.monotonic()
    output = model(
        batch["sample"].permute(0, 3, 1, 2),
        batch["timesteps"],
        batch["text"],
        added_cond_kwargs={"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]},
    ).sample
    return output.permute(0, 2, 3, 1).numpy(), seconds | {"run": time.monotonic() - start}


def ours(folder: pathlib.Path, config: Any, side: int) -> tuple[np.ndarray, dict[str, float]]:
    """Reads the files and runs our model; returns the output and {stage: seconds}."""
    import jax

    path = folder / "unet" / "config.json"
    read = diffusers_configs.read_unet(json.loads(path.read_text()), str(path))
    assert read == config, (read, config)
    batch, unet = inputs(config, side), UNet(config)
    example = jax.eval_shape(unet.init, jax.random.key(0), **batch)["params"]
    start = time.monotonic()
    params = diffusers_folder.load_part(
        folder,
        "unet",
        example,
        dtype=np.float32,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    seconds = {"read": time.monotonic() - start}

    def predict(params, batch):
        return unet.apply({"params": params}, **batch)[0]

    start = time.monotonic()
    compiled = jax.jit(predict).lower(params, batch).compile()
    seconds["compile"] = time.monotonic() - start
    start = time.monotonic()
    output = np.asarray(compiled(params, batch))
    return output, seconds | {"run": time.monotonic() - start}


def compare(folder: pathlib.Path, small: bool) -> float:
    """Runs both models in separate processes; prints and returns the relative error."""
    outputs = {}
    for side in ("theirs", "ours"):
        command = [sys.executable, __file__, f"--folder={folder}", f"--side={side}"]
        subprocess.run(command + ["--small"] * small, check=True)
        outputs[side] = np.load(folder / OUTPUT.format(side)).astype(np.float64)
        result = json.loads((folder / RESULT.format(side)).read_text())
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
        name = "diffusers" if side == "theirs" else "focusdpo_jax"
        print(f"{name}: {seconds}; peak {result['peak'] / 1e9:.2f} GB", flush=True)
    difference = np.linalg.norm(outputs["ours"] - outputs["theirs"])
    error = float(difference / np.linalg.norm(outputs["theirs"]))
    print(f"relative error of the output: {error:.3g}")
    return error


def main() -> None:
    """Compares the models, or runs one of them (`--side`, for the script's own processes)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="test with a tiny model, in seconds")
    parser.add_argument("--folder", help="folder of the weights; default: a temporary one")
    parser.add_argument("--side", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side is None:
        if flags.folder:
            pathlib.Path(flags.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            compare(pathlib.Path(folder), flags.small)
        return
    folder, run = pathlib.Path(flags.folder), {"theirs": theirs, "ours": ours}[flags.side]
    output, seconds = run(folder, *((SMALL, SMALL_SIDE) if flags.small else (FULL, FULL_SIDE)))
    np.save(folder / OUTPUT.format(flags.side), output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / RESULT.format(flags.side)).write_text(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
