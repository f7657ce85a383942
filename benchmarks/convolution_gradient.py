"""Times the gradient of a 3 x 3 convolution: `models.convolution.conv2d` beside XLA's own.

    python benchmarks/convolution_gradient.py

Both run in turn in one process, so that the ratio holds on a noisy machine. It prints the median
milliseconds of each, their ratio, and the largest relative difference of the gradients.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models.convolution import conv2d

SHAPES = [(32, 16, 32, 32), (32, 16, 96, 32), (32, 16, 64, 64), (32, 8, 64, 64), (32, 8, 128, 64),
          (16, 64, 16, 16)]


def xla(x, kernel):
    """XLA's convolution and its automatic gradient."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def main(repeats=15):
    """Prints one line a shape: batch, side, channels in and out."""
    print(f"{jax.devices()[0].device_kind}; forward and both gradients, ms")
    for batch, side, width, features in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (batch, side, side, width))
        kernel = 0.05 * jax.random.normal(keys[1], (3, 3, width, features))
        outer = jax.random.normal(keys[2], (batch, side, side, features))
        functions = [jax.jit(lambda x, k, g, f=f: jax.vjp(f, x, k)[1](g)) for f in (xla, conv2d)]
        results = [jax.block_until_ready(f(x, kernel, outer)) for f in functions]
        error = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(*results))
        times = [[], []]
        for _ in range(repeats):
            for function, record in zip(functions, times):
                start = time.perf_counter()
                jax.block_until_ready(function(x, kernel, outer))
                record.append(time.perf_counter() - start)
        theirs, ours = (1e3 * np.median(t) for t in times)
        ratio = np.median(np.array(times[0]) / np.array(times[1]))
        print(f"{batch:3d} x {side:2d} x {side:2d}, {width:3d} -> {features:3d}: "
              f"xla {theirs:7.2f}  ours {ours:7.2f}  ratio {ratio:.2f}  error {error:.1e}")


if __name__ == "__main__":
    main()
