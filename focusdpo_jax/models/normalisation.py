"""Layer and group normalisation with hand-written backward passes.

Normalisation is limited by memory bandwidth. Forward and backward pass read each feature map twice:
once for all sums over it, once to write the result. The backward pass saves the input and its
float32 statistics.

In float32 the variance is the mean of squared deviations. In half precision it is E[x^2] - E[x]^2,
which needs no pass beyond that of the mean, and whose rounding error is far below that of the
input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _statistics(x: Array, axis: int) -> tuple[Array, Array]:
    """Returns mean and variance of x over an axis, which is kept, in float32."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis, keepdims=True)
    if x.dtype == jnp.float32:
        return mean, jnp.square(wide - mean).mean(axis, keepdims=True)
    square = jnp.square(wide).mean(axis, keepdims=True)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def layer_norm(
    x: Float[Array, "*batch channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    epsilon: float,
    dtype: Any,
) -> Float[Array, "*batch channels"]:
    """Normalises x over its last axis, then scales and shifts it.

    Args:
      x: [..., C].
      scale, bias: [C].
      epsilon: added to the variance.
      dtype: type of the result.

    Returns:
      [..., C] in `dtype`.
    """
    return _layer_norm(x, scale, bias, epsilon, dtype)


def _layer_norm_primal(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Any) -> Array:
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


_layer_norm = jax.custom_vjp(_layer_norm_primal, nondiff_argnums=(3, 4))


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    mean, variance = _statistics(x, -1)
    rate = jax.lax.rsqrt(variance + epsilon)
    normed = (x.astype(jnp.float32) - mean) * rate
    out = (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)
    return out, (x, scale, bias, mean, rate)


def _layer_norm_gradients(epsilon, dtype, residuals, gradient):
    del epsilon, dtype
    x, scale, bias, mean, rate = residuals
    gradient = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * rate
    rows = tuple(range(x.ndim - 1))
    scaled = gradient * scale.astype(jnp.float32)
    projection = (scaled * normed).mean(-1, keepdims=True)
    d_x = rate * (scaled - scaled.mean(-1, keepdims=True) - normed * projection)
    return (
        d_x.astype(x.dtype),
        (gradient * normed).sum(rows).astype(scale.dtype),
        gradient.sum(rows).astype(bias.dtype),
    )


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_gradients)


def group_norm(
    x: Float[Array, "batch *positions channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    groups: int,
    epsilon: float,
    dtype: Any,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "batch *positions channels"]:
    """Normalises x over all positions and the channels of each group, then scales and shifts it.

    Args:
      x: [B, ..., C].
      scale, bias: [C].
      groups: number of groups of consecutive channels; divides C.
      epsilon: added to the variance.
      dtype: type of the result.
      activation: elementwise function of the result, applied in float32, or None.

    Returns:
      [B, ..., C] in `dtype`.
    """
    return _group_norm(x, scale, bias, groups, epsilon, dtype, activation)


def _group_norm_primal(
    x: Array,
    scale: Array,
    bias: Array,
    groups: int,
    epsilon: float,
    dtype: Any,
    activation: Callable[[Array], Array] | None,
) -> Array:
    return _group_norm_forward(x, scale, bias, groups, epsilon, dtype, activation)[0]


_group_norm = jax.custom_vjp(_group_norm_primal, nondiff_argnums=(3, 4, 5, 6))


def _group_norm_forward(x, scale, bias, groups, epsilon, dtype, activation):
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    # Reduce over the positions first, then over the few channels of a group. A reduction over both
    # at once reads memory with a stride, and takes a CPU three times as long as the whole step.
    mean, variance = _statistics(pixels, 1)
    group_mean = _group_means(mean, groups)
    group_variance = _group_means(variance + jnp.square(mean - group_mean), groups)
    rate = jax.lax.rsqrt(group_variance + epsilon)
    out = _normalise(pixels, scale, bias, group_mean, rate)
    if activation is not None:
        out = activation(out)
    return out.astype(dtype).reshape(x.shape), (x, scale, bias, group_mean, rate)


def _group_means(values: Float[Array, "batch 1 channels"], groups: int) -> Array:
    """Returns the mean over each group of channels, repeated for its channels: [B, 1, C]."""
    grouped = values.reshape(len(values), 1, groups, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(values.shape)


def _normalise(pixels: Array, scale: Array, bias: Array, mean: Array, rate: Array) -> Array:
    gain = rate * scale.astype(jnp.float32)
    return pixels.astype(jnp.float32) * gain + (bias.astype(jnp.float32) - mean * gain)


def _group_norm_gradients(groups, epsilon, dtype, activation, residuals, gradient):
    del epsilon, dtype
    x, scale, bias, mean, rate = residuals
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    gradient = gradient.reshape(pixels.shape).astype(jnp.float32)
    if activation is not None:
        _, back = jax.vjp(activation, _normalise(pixels, scale, bias, mean, rate))
        (gradient,) = back(gradient)
    # Per example and channel, the gradients of bias and scale.
    d_bias = gradient.sum(1, keepdims=True)
    d_scale = (gradient * (pixels.astype(jnp.float32) - mean)).sum(1, keepdims=True) * rate
    positions, scale32 = pixels.shape[1], scale.astype(jnp.float32)
    shift = _group_means(d_bias * scale32, groups) / positions
    slope = _group_means(d_scale * scale32, groups) / positions
    d_x = rate * (gradient * scale32 - shift - (pixels.astype(jnp.float32) - mean) * rate * slope)
    return (
        d_x.astype(x.dtype).reshape(x.shape),
        d_scale.sum((0, 1)).astype(scale.dtype),
        d_bias.sum((0, 1)).astype(bias.dtype),
    )


_group_norm.defvjp(_group_norm_forward, _group_norm_gradients)
