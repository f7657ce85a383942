"""Writes weights and inputs of a case of `step.py` to a folder, for all sides.

    step_inputs.py CASE FOLDER STEPS DTYPE REMAT

Runs in a separate process, so that the memory of the sides contains only what their steps need.
"""

import dataclasses
import json
import pathlib
import pickle
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_cases import changed, load_config

from focusdpo_jax.checkpoints import pytorch_names, tensor_file
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import Generator, ImageView
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import assembly, generator_step, models, shapes

PARTS = ("unet", "adapter")
# A quarter of SDXL's widths, with SDXL's number of heads, since 5 is not divisible by 4.
QUARTER = {
    "block_out_channels": (80, 160, 320),
    "num_heads": (5, 10, 20),
    "norm_groups": 20,
    "cross_attention_dim": 512,
    "pooled_dim": 320,
    "addition_time_embed_dim": 64,
    "image_context": True,
}


def configuration(case, dtype: str, remat: bool):
    """The RunConfig and the GeneratorConfig of a case in `step.CASES`."""
    if case == "toybox":
        config = load_config("toybox_dpo")
    else:
        side = 1024 if case == "sdxl-1024" else 512
        config = load_config("sdxl_dpo", batch_size=1, resolution=side)
    config = changed(
        config,
        objective="dpo",
        anchor=0.0,
        trainable="adapter",
        dtype=dtype,
        accumulate=1,
        learning_rate=1e-6,
        warmup_steps=0,
        # SDXL's beta, 5000, would amplify rounding errors in the losses.
        beta=100.0,
        data__cache=True,
        model__remat=remat,
        # On a CPU a loop takes less time and memory than unrolled blocks.
        model__scan_layers=jax.default_backend() == "cpu",
    )
    sizes = models.abstract_model(
        config, meshes.make_mesh(config.mesh.sizes, config.batch_size, jax.devices()[:1])
    )[0].config
    if case == "quarter":
        sizes = dataclasses.replace(
            sizes,
            unet=dataclasses.replace(sizes.unet, **QUARTER),
            adapter=dataclasses.replace(sizes.adapter, output_dim=512, width=320, num_heads=5),
        )
    return config, sizes


def make_objective(config: Any, sizes: Any):
    """`GeneratorStep` of a configuration with a generator of these sizes."""
    return generator_step.GeneratorStep(
        Generator(sizes, jnp.dtype(config.dtype)),
        config,
        np.zeros((2, sizes.text_encoder.max_length), np.int32),
    )


def random_parameter(path, leaf):
    """A random parameter without zeros, scaled to preserve the variance of activations."""
    rng = np.random.default_rng(zlib.crc32("/".join(path).encode()))
    if stacking.is_vector(path, leaf.shape):
        return (path[-1] == "scale") + 0.02 * rng.standard_normal(leaf.shape, np.float32)
    summed = leaf.shape[stacking.STACKED in path : -1]
    return rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(summed), dtype=np.float32)


def inputs(config: Any, generator: Any):
    """Random EncodedPairs for a generator."""
    _, encode = assembly.make_encoder(generator, config, assembly.focus_buckets(config))
    return random_pairs(
        jax.eval_shape(
            encode,
            {
                part: jax.eval_shape(lambda part=part: generator.init_part(part, jax.random.key(0)))
                for part in ("vae", "image_encoder", "text_encoder", "text_encoder_2")
            },
            shapes.raw_batch(config, generator),
        ),
        config,
        generator.config.unet,
    )


def random_pairs(shape, config: Any, unet):
    """Random EncodedPairs as numpy arrays, with all references present.

    Args:
      shape: EncodedPairs of `jax.ShapeDtypeStruct`.
      config: RunConfig, for the resolution.
      unet: UNetConfig, for the widths of text and pooled text.
    """
    rng = np.random.default_rng(0)
    count, length = shape.text.shape[:2]

    def normal(leaf, *size) -> Any:
        return rng.standard_normal(size or leaf.shape, np.float32).astype(leaf.dtype)

    side = config.resolution
    return dataclasses.replace(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shape),
        latents_mean=normal(shape.latents_mean),
        references=ImageView(normal(shape.references.features)),
        text=normal(shape.text, count, length, unet.cross_attention_dim),
        pooled=normal(shape.pooled, count, unet.pooled_dim),
        present=np.ones(shape.present.shape, bool),
        time_ids=np.tile(np.array([side, side, 0, 0, side, side], np.float32), (count, 1)),
    )


def write_sizes(folder: pathlib.Path, config: Any, sizes: Any) -> None:
    """Writes the values of RunConfig and GeneratorConfig that `step_diffusers` reads."""
    (folder / "sizes.json").write_text(
        json.dumps(
            {
                "unet": dataclasses.asdict(sizes.unet),
                "adapter": dataclasses.asdict(sizes.adapter),
                "learning_rate": config.learning_rate,
                "weight_decay": config.weight_decay,
                "adam_b2": config.adam_b2,
                "gradient_clip": config.gradient_clip,
                "beta": config.beta,
            }
        )
    )


def write_conditioning(folder: pathlib.Path, pairs) -> None:
    """Writes the conditioning in EncodedPairs of numpy arrays for `step_diffusers`."""
    np.savez(
        folder / "conditioning.npz",
        **{  # pyright: ignore[reportArgumentType]: names of arrays, none is allow_pickle
            name: np.asarray(value, np.float32)
            for name, value in {
                "text": pairs.text,
                "pooled": pairs.pooled,
                "time_ids": pairs.time_ids,
                "features": pairs.references.features,
            }.items()
        },
    )


def main() -> None:
    """Writes sizes, weights with diffusers' names, conditioning, and the noise of every step."""
    case, folder, steps, dtype, remat = sys.argv[1:]
    folder = pathlib.Path(folder)
    config, sizes = configuration(case, dtype, remat == "1")
    generator = Generator(sizes, jnp.dtype(dtype))
    write_sizes(folder, config, sizes)
    for part in PARTS:
        shape = jax.eval_shape(lambda part=part: generator.init_part(part, jax.random.key(0)))
        tree = jax.tree_util.tree_map_with_path(
            lambda path, leaf, part=part: random_parameter((part, *(k.key for k in path)), leaf),
            shape,
        )
        tensor_file.write(folder / f"{part}.safetensors", pytorch_names.from_flax(tree))
    pairs = inputs(config, generator)
    (folder / "pairs.pickle").write_bytes(pickle.dumps(pairs))
    write_conditioning(folder, pairs)
    objective = make_objective(config, sizes)
    ((_, params),) = assembly.focus_buckets(config).values()
    key = meshes.random_key(
        config.seed, meshes.make_mesh(config.mesh.sizes, config.batch_size, jax.devices()[:1])
    )
    for step in range(int(steps)):
        noisy = objective.noisy(pairs, params, jax.random.fold_in(key, step))
        np.savez(folder / f"noisy_{step}.npz", **noisy._asdict())


if __name__ == "__main__":
    main()
