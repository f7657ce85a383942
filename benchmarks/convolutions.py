"""Times 3 x 3 convolutions on a CPU: XLA's own and `models.convolution.conv2d`.

    python benchmarks/convolutions.py

Three variants of the forward pass and of both gradients run alternately in one process, so that
their ratios are reliable on a noisy machine: XLA's convolution with XLA's default options, the same
with the options of `focusdpo_jax.compiling`, and ours with these options. Printed are the GFLOP/s
of the first variant, the speedups of the others over it, and the largest relative error of ours.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax import compiling
from focusdpo_jax.models.convolution import conv2d

# Batch, side, input and output channels: Toybox, then SDXL at a quarter of its widths.
SHAPES = [
    (32, 16, 32, 32),
    (32, 16, 96, 32),
    (32, 16, 64, 64),
    (32, 8, 64, 64),
    (32, 8, 128, 64),
    (2, 64, 80, 80),
    (2, 32, 160, 160),
    (2, 16, 320, 320),
    (2, 16, 640, 320),
]


def xla(x, kernel):
    """XLA's convolution, which JAX differentiates automatically."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_gradients(function):
    """Returns the gradients of x and kernel as a function of the output's cotangent."""
    return lambda x, kernel, cotangent: jax.vjp(function, x, kernel)[1](cotangent)


def main(repeats: int = 25) -> None:
    """Prints one line per shape and pass."""
    options = compiling.default_network_options()
    print(f"{jax.devices()[0].device_kind}; {options}")
    for batch, side, width, features in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (batch, side, side, width))
        kernel = 0.05 * jax.random.normal(keys[1], (3, 3, width, features))
        cotangent = jax.random.normal(keys[2], (batch, side, side, features))
        operations = 2 * x.size * 9 * features
        for name, passes, arguments, transform in (
            ("forward", 1, (x, kernel), lambda f: f),
            ("gradients", 2, (x, kernel, cotangent), with_gradients),
        ):
            programs = [
                jax.jit(transform(xla)),
                jax.jit(transform(xla), compiler_options=options),
                jax.jit(transform(conv2d), compiler_options=options),
            ]
            first, *_, ours = [jax.tree.leaves(program(*arguments)) for program in programs]
            error = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(first, ours))
            times = np.empty((repeats, len(programs)))
            for row in times:
                for i, program in enumerate(programs):
                    start = time.perf_counter()
                    jax.block_until_ready(program(*arguments))
                    row[i] = time.perf_counter() - start
            speedups = np.median(times[:, :1] / times, axis=0)
            print(
                f"{batch:3d} x {side:2d} x {side:2d}, {width:3d} -> {features:3d}, {name:9s}: "
                f"{passes * operations / np.median(times[:, 0]) / 1e9:4.0f} GFLOP/s; with options "
                f"{speedups[1]:.2f} times, ours {speedups[2]:.2f} times; error {error:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
