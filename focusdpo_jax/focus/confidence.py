"""Estimates low prediction confidence from the reference model's error.

    error map of the reference model --window--> smoothed error --inside the prior--> U in [0, 1]

The penalty on regions of low prediction confidence is [known] (the abstract of FocusDPO, arXiv
2509.01181). The estimate from the reference model's error, the window and the scale are [ours]; the
reference pass computes this error in any case. Unlike M_d, U depends on the noise and the timestep
of the step.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.array_types import AnyArray


def smoothed(
    maps: Float[AnyArray, "batch height width"], radius: int = 1
) -> Float[Array, "batch height width"]:
    """Computes means over square windows of side 2 radius + 1, truncated at the border."""
    side = 2 * radius + 1

    def sums(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, side, side), (1, 1, 1), "SAME")

    return sums(maps) / sums(jnp.ones_like(maps))


def uncertainty(
    error: Float[AnyArray, "batch height width"], prior: Float[AnyArray, "batch height width"]
) -> Float[Array, "batch height width"]:
    """Computes U: the smoothed error over its largest value inside the prior, at most 1 [ours].

    Smoothing reduces the variance due to a single noise sample. The scale removes the dependence of
    the error's size on the timestep, and keeps the order of locations.

    Args:
      error: the reference model's error map, >= 0.
      prior: M_prior, share of each location covered, in [0, 1].

    Returns:
      A map in [0, 1] without gradient; 0 everywhere if the prior is empty or the error is 0.
    """
    error = smoothed(jax.lax.stop_gradient(error.astype(jnp.float32)))
    largest = jnp.max(error * prior, axis=(1, 2), keepdims=True)
    return jnp.where(largest > 0, jnp.minimum(error / jnp.where(largest > 0, largest, 1), 1), 0)
