"""Layer and group normalisation with backward passes of their own.

Norms are bound by memory. Both passes here read each map twice: once for all sums over it, once to
write the result. What is kept for the backward pass is the input and its statistics, which are float32.

In float32 the variance is the mean of squared deviations. In half precision it is E[x^2] - E[x]^2, which
takes the same pass as the mean, and whose rounding is far below that of the input.
"""

import functools

import jax
import jax.numpy as jnp


def _statistics(x, axis):
    """Mean and variance of x, of any type, over an axis that is kept, in float32."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis, keepdims=True)
    if x.dtype == jnp.float32:
        return mean, jnp.square(wide - mean).mean(axis, keepdims=True)
    square = jnp.square(wide).mean(axis, keepdims=True)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x, scale, bias, epsilon, dtype):
    """Normalises x [..., C] over its last axis, then scales and shifts by `scale` and `bias` [C].

    Returns:
      [..., C] in `dtype`.
    """
    return _layer_norm(x, scale, bias, epsilon, dtype)[0]


def _layer_norm(x, scale, bias, epsilon, dtype):
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
    along = (scaled * normed).mean(-1, keepdims=True)
    of_x = rate * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
    return (
        of_x.astype(x.dtype),
        (gradient * normed).sum(rows).astype(scale.dtype),
        gradient.sum(rows).astype(bias.dtype),
    )


layer_norm.defvjp(_layer_norm, _layer_norm_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(x, scale, bias, groups, epsilon, dtype, activation):
    """Normalises x [B, ..., C] over positions and the channels of each group, scales and shifts.

    Args:
      scale, bias: [C].
      groups: into how many the channels are divided.
      activation: elementwise function of the result, applied in float32, or None.

    Returns:
      [B, ..., C] in `dtype`.
    """
    return _group_norm(x, scale, bias, groups, epsilon, dtype, activation)[0]


def _group_norm(x, scale, bias, groups, epsilon, dtype, activation):
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    # First each channel over the positions, then the few channels of a group: reducing over both at
    # once makes XLA walk across memory, and costs a CPU three times the whole step.
    mean, variance = _statistics(pixels, 1)
    group_mean = _group_means(mean, groups)
    group_variance = _group_means(variance + jnp.square(mean - group_mean), groups)
    rate = jax.lax.rsqrt(group_variance + epsilon)
    out = _normed(pixels, scale, bias, group_mean, rate)
    if activation is not None:
        out = activation(out)
    return out.astype(dtype).reshape(x.shape), (x, scale, bias, group_mean, rate)


def _group_means(values, groups):
    """The mean over each group of channels of values [B, 1, C], for each of its channels."""
    grouped = values.reshape(len(values), 1, groups, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(values.shape)


def _normed(pixels, scale, bias, mean, rate):
    gain = rate * scale.astype(jnp.float32)
    return pixels.astype(jnp.float32) * gain + (bias.astype(jnp.float32) - mean * gain)


def _group_norm_gradients(groups, epsilon, dtype, activation, residuals, gradient):
    del epsilon, dtype
    x, scale, bias, mean, rate = residuals
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    gradient = gradient.reshape(pixels.shape).astype(jnp.float32)
    if activation is not None:
        _, back = jax.vjp(activation, _normed(pixels, scale, bias, mean, rate))
        (gradient,) = back(gradient)
    total = gradient.sum(1, keepdims=True)
    along = (gradient * (pixels.astype(jnp.float32) - mean)).sum(1, keepdims=True) * rate
    positions, scaled = pixels.shape[1], scale.astype(jnp.float32)
    shift = _group_means(total * scaled, groups) / positions
    slope = _group_means(along * scaled, groups) / positions
    of_x = rate * (gradient * scaled - shift - (pixels.astype(jnp.float32) - mean) * rate * slope)
    return (
        of_x.astype(x.dtype).reshape(x.shape),
        along.sum((0, 1)).astype(scale.dtype),
        total.sum((0, 1)).astype(bias.dtype),
    )


group_norm.defvjp(_group_norm, _group_norm_gradients)
