"""Prints the kernel of each attention of SDXL's networks by device, as a Markdown table.

    python benchmarks/attention_kernels.py                    # at 512, 768 and 1024 px
    python benchmarks/attention_kernels.py --sides 1024

Traces every network of a run for each device, at full size, in bfloat16 and from shapes alone.
Nothing is compiled, and neither a device nor its libraries are needed.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from focusdpo_jax.checkpoints.single_file import SDXL
from focusdpo_jax.models import attention, platforms
from focusdpo_jax.models.clip import CLIPText, CLIPVision, CLIPVisionConfig
from focusdpo_jax.models.dino import DINO, DINOConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig, subject_adapter
from focusdpo_jax.models.unet import UNet
from focusdpo_jax.models.vae import VAE

TARGETS = {
    "CPU": platforms.Target("cpu"),
    "TPU": platforms.Target("tpu"),
    "Turing": platforms.Target("gpu", 7.5),
    "Ampere": platforms.Target("gpu", 8.0),
    "Hopper": platforms.Target("gpu", 9.0),
}
SIDES = (512, 768, 1024)
BIG_G = CLIPVisionConfig(
    hidden_size=1664, num_layers=48, num_heads=16, intermediate_size=8192, projection_dim=1280
)
DINOV2 = DINOConfig(image_size=518, patch_size=14, epsilon=1e-6, layer_scale=True)
SLOTS = 3  # Slots for reference images.


def networks(side: int) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """{name: (module, inputs, keyword arguments of apply)} of every network with attention.

    Args:
      side: of the generated image, in pixels.
    """

    def shape(*axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(axes, dtype)

    latent = side // 8
    adapter = SubjectAdapterConfig(num_tokens=16)
    unet = UNet(SDXL["unet"], jnp.bfloat16)
    conditioning = (
        shape(1, dtype=jnp.float32),
        shape(1, 77, 2048),
        shape(1, 1280),
        shape(1, 6, dtype=jnp.float32),
        shape(1, SLOTS, adapter.num_tokens, 2048),
        shape(1, SLOTS, dtype=bool),
    )
    vae = VAE(SDXL["vae"], jnp.bfloat16)
    text = shape(1, 77, dtype=jnp.int32)
    return {
        "UNet": (unet, (shape(1, latent, latent, 4), *conditioning), {}),
        "UNet, references in masks": (
            unet,
            (shape(1, latent, latent, 4), *conditioning),
            {"image_masks": shape(1, SLOTS, side, side, dtype=jnp.float32)},
        ),
        "resampler (IP-Adapter-Plus)": (
            subject_adapter(adapter, jnp.bfloat16),
            (shape(1, SLOTS, 257, 1280),),
            {},
        ),
        "grounding resampler (MS-Diffusion)": (
            subject_adapter(SubjectAdapterConfig(kind="grounding"), jnp.bfloat16),
            (shape(1, SLOTS, 257, 1280), shape(1, SLOTS, 768), shape(1, SLOTS, 4)),
            {},
        ),
        "text encoder": (CLIPText(SDXL["text_encoder"], jnp.bfloat16), (text,), {}),
        "text encoder 2": (CLIPText(SDXL["text_encoder_2"], jnp.bfloat16), (text,), {}),
        "CLIP ViT-H": (CLIPVision(CLIPVisionConfig(), jnp.bfloat16), (shape(1, 224, 224, 3),), {}),
        "CLIP ViT-bigG": (CLIPVision(BIG_G, jnp.bfloat16), (shape(1, 224, 224, 3),), {}),
        "DINO ViT-S/16": (DINO(DINOConfig(), jnp.bfloat16), (shape(1, 224, 224, 3),), {}),
        "DINOv2 ViT-S/14, 448 px": (DINO(DINOV2, jnp.bfloat16), (shape(1, 448, 448, 3),), {}),
        "VAE, encoding": (vae, (shape(1, side, side, 3),), {"method": "encode"}),
        "VAE, decoding": (vae, (shape(1, latent, latent, 4),), {"method": "decode"}),
    }


@functools.cache
def _parameters(name, side):
    module, inputs, keywords = networks(side)[name]
    init = {key: value for key, value in keywords.items() if key == "method"}
    if name.startswith("VAE"):
        inputs, init = (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.bfloat16),), {}
    return jax.eval_shape(functools.partial(module.init, **init), jax.random.key(0), *inputs)


@contextlib.contextmanager
def cudnn_to_trace() -> Iterator[None]:
    """Replaces JAX's check of the cuDNN version, so that cuDNN kernels are traced without cuDNN."""
    checked = fused_attention_stablehlo.check_cudnn_version
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = checked


def calls(name: str, side: int, target: platforms.Target) -> set[attention.Call]:
    """The `attention.Call`s of a forward pass. As in a run, kernels may be partitioned."""
    module, inputs, keywords = networks(side)[name]
    method = {key: value for key, value in keywords.items() if key == "method"}
    arrays = {key: value for key, value in keywords.items() if key != "method"}
    parameters = _parameters(name, SIDES[0])  # Not recorded: initialisation also calls attention.
    with (
        cudnn_to_trace(),
        platforms.target_platform(target, lambda attend: attend),
        attention.recorded_calls() as recorded,
    ):
        jax.eval_shape(
            lambda parameters, inputs, arrays: module.apply(
                parameters, *inputs, **arrays, **method
            ),
            parameters,
            inputs,
            arrays,
        )
    return recorded or set()


def rows(sides: Iterable[int]) -> list[tuple[str, attention.Call, dict[str, str]]]:
    """The distinct rows of the table: (network, call without kernel, {device: kernel})."""
    kernels = {}
    for side in sides:
        for name in networks(side):
            label = f"{name}, {side} px" if name.startswith(("UNet", "VAE")) else name
            for device, target in TARGETS.items():
                for call in sorted(calls(name, side, target), reverse=True):
                    row = kernels.setdefault((label, call._replace(kernel="")), {})
                    row[device] = call.kernel
    return [(*key, row) for key, row in kernels.items()]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES)
    print(f"| network | queries | keys | heads | {' | '.join(TARGETS)} |")
    print("| --- " * (4 + len(TARGETS)) + "|")
    for name, call, kernels in rows(parser.parse_args().sides):
        keys = f"{call.keys}{', masked' * call.masked}{', causal' * call.causal}"
        print(
            f"| {name} | {call.queries} | {keys} | {call.heads} of {call.head_dim} | "
            + " | ".join(f"`{kernels[device]}`" for device in TARGETS)
            + " |"
        )


if __name__ == "__main__":
    main()
