"""Measures the peak speed of matrix products on a device, the reference for a run's utilisation."""

import time
from typing import Any

import jax
import jax.numpy as jnp

# Side of the matrices: large enough for full speed, small enough to be fast.
_SIDES = {"cpu": 1024}
_SIDE = 8192
_REPEATS = 6


def matmul_peak(device: Any, dtype: str) -> float:
    """Measures the floating-point operations per second of one device in a large matrix product.

    Returns the best of a few runs, in the precision in which layers of this type multiply.

    Args:
      device: a `jax.Device` of this process.
      dtype: name of the type of the computation.
    """
    side = _SIDES.get(device.platform, _SIDE)
    matrix = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
