"""Generates one image as `sample` does: seconds and memory, also of the decoder by itself."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax import compiling
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import ImageView
from focusdpo_jax.profiling.peak_flops import matmul_peak
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.training import memory, models

from . import cases, weights


def measure(settings: Any, context: Any):
    """Yields a row for the decoder and one for the whole image."""
    del context
    config = cases.configuration(settings)
    mesh, device = cases.one_device(config), jax.devices()[0]
    generator, shapes = models.abstract_model(config, mesh)
    # Sampling uses the dtype of the computation for all parameters, also for trained ones.
    parameters = weights.random_parameters(
        jax.tree_util.tree_map_with_path(
            functools.partial(_with_computation_dtype, generator.unet.dtype), shapes
        )
    )
    sizes, side = generator.config, settings["resolution"]
    length = sizes.text_encoder.max_length
    references, latents = config.data.subject_counts, generator.latent_shape(side)
    slots = len(references)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    tokens = jnp.asarray(rng.integers(1, sizes.text_encoder.vocab_size, (1, 2, length)), jnp.int32)
    arguments = (
        tokens,
        jnp.asarray([[side, side, 0, 0, side, side]], jnp.float32),
        ImageView(
            normal(1, slots, 1 + sizes.image_encoder.num_patches, sizes.image_encoder.hidden_size)
        ),
        jnp.ones((1, slots), bool),
        normal(1, *latents),
    )
    generate = make_generate(
        generator,
        steps=settings["steps"],
        guidance=settings["guidance"],
        negative_token_ids=np.asarray(tokens[0]),
    )
    decode = jax.jit(
        lambda parameters, latents: generator.decode_latents(parameters, latents),
        compiler_options=compiling.default_network_options(),
    )
    peak = matmul_peak(device, config.dtype)
    for name, function, inputs in (
        ("decoder", decode, (normal(1, *latents),)),
        ("image", generate, arguments),
    ):
        start = time.monotonic()
        with trace_context(mesh):
            compiled = function.lower(parameters, *inputs).compile()
        row = {
            "key": name,
            "what": name,
            "compile_seconds": time.monotonic() - start,
            "matmul_peak": peak,
            "held": memory.bytes_per_device(parameters),
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,  # pyright: ignore[reportOptionalMemberAccess]
        }
        seconds = []
        for _ in range(1 + settings["repeats"]):
            start = time.perf_counter()
            image = jax.block_until_ready(compiled(parameters, *inputs))
            seconds.append(time.perf_counter() - start)
        image = np.asarray(image, np.float32)
        yield row | {
            "seconds": float(np.median(seconds[1:])),
            "rounds": seconds[1:],
            "finite": bool(np.isfinite(image).all()),
            "deviation": float(image.std()),
            "memory": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        }


def _with_computation_dtype(dtype, path, leaf):
    names = tuple(key.key for key in path)
    kind = jnp.float32 if stacking.is_vector(names, leaf.shape) else dtype
    return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=leaf.sharding)
