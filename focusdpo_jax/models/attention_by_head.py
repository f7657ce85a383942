"""Attention for CPUs: computes the logits of a few heads at a time and saves none of them.

Three measures make it fast (`benchmarks/attention.py` prints the times):

- The logits of all heads are far larger than a cache, and XLA writes and reads them several times.
  So they are computed for as many heads at a time as fit a cache.
- The backward pass recomputes the softmax from its normaliser (as in flash attention, arXiv
  2205.14135), so that no logits are saved, and for few keys not even the output.
- Every matrix product contracts the last axis of the first matrix with the rows of the second, in
  the order in which they are stored. XLA's CPU backend runs it five to ten times as fast as a
  product that contracts the rows of both, which the gradients of keys and values would need. The
  arrays to transpose for this, queries and gradients, are small, and are transposed first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Logits at a time: 12 MiB (measured; a head of 1024 queries and keys of two images has 8 MiB).
_LOGITS = 3 * 2**20
# Up to this many keys it is cheaper to sum over them again than to save the output (measured).
_FEW_KEYS = 128
# Added to the logits of masked keys.
_MASKED = -1e30


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    key_mask: Bool[Array, "batch keys"] | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes softmax(query key^T / sqrt(d)) value per head.

    Args:
      query: [B, Q, H, d].
      key, value: [B, K, H, d].
      key_mask: bool [B, K], true where a key may be attended to. The output of a row without any
        such key is the mean of its values, which the caller has to discard.

    Returns:
      [B, Q, H, d].
    """
    bias = None if key_mask is None else jnp.where(key_mask, 0, _MASKED)[:, None, :]
    return _attend(query, key, value, bias)


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
    return _forward(query, key, value, bias)[0]


def _forward(query, key, value, bias):
    """The output, and the residuals of the backward pass."""
    residuals = query, key, value, bias

    def heads(query, key_t, value):
        logits = _logits(query, key_t, bias)
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        out = _matmul(weights.astype(value.dtype), value) / total
        return out.astype(value.dtype), largest + jnp.log(total)

    query, key, value = map(_heads_first, (query, key, value))
    out, normaliser = _map_heads(
        heads, query.shape[2] * key.shape[2], query, _scale_and_transpose(key), value
    )
    out = out.transpose(1, 2, 0, 3)
    return out, (*residuals, normaliser, None if key.shape[2] <= _FEW_KEYS else out)


def _backward(residuals, gradient):
    """Gradients of query, key and value; `_t` marks transposed matrices."""
    query, key, value, bias, normaliser, out = residuals
    mean = (
        []
        if out is None
        else [_heads_first((gradient * out).sum(-1, keepdims=True, dtype=jnp.float32))]
    )
    query, key, value, gradient = map(_heads_first, (query, key, value, gradient))
    scale = query.shape[-1] ** -0.5

    def heads(query_t, key, key_t, value_t, normaliser, query, gradient, gradient_t, *mean):
        probabilities = jnp.exp(_logits(query, key_t, bias) - normaliser)
        d_probabilities = _matmul(gradient, value_t)
        mean = mean[0] if mean else (probabilities * d_probabilities).sum(-1, keepdims=True)
        d_logits = probabilities * (d_probabilities - mean)
        probabilities, d_logits = probabilities.astype(query.dtype), d_logits.astype(query.dtype)
        return (
            _matmul(d_logits, key),
            _matmul(query_t, d_logits),
            _matmul(gradient_t, probabilities),
        )

    gradients = _map_heads(
        heads,
        query.shape[2] * key.shape[2],
        _transpose(query),
        key,
        _scale_and_transpose(key),
        _transpose(value),
        normaliser,
        query,
        gradient,
        _transpose(gradient),
        *mean,
    )
    d_query, d_key, d_value = (x.astype(query.dtype) for x in gradients)
    return (
        (d_query * scale).transpose(1, 2, 0, 3),
        (d_key * scale).transpose(1, 3, 0, 2),
        d_value.transpose(1, 3, 0, 2),
        None,
    )


_attend.defvjp(_forward, _backward)


def _heads_first(x: Float[Array, "b n h d"]) -> Float[Array, "h b n d"]:
    return x.transpose(2, 0, 1, 3)


def _map_heads(function: Callable, logits: int, *arrays: Array) -> list[Array]:
    """Applies `function` to as many heads at a time as `_LOGITS` allows.

    Args:
      function: a function of arrays [h * B, ...] of h heads.
      logits: number of logits of one head of one example.
      arrays: [H, B, ...].
    """
    heads, batch = arrays[0].shape[:2]
    at_once = max(
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n == 1 or n * batch * logits <= _LOGITS)
    )
    groups = [x.reshape(heads // at_once, at_once * batch, *x.shape[2:]) for x in arrays]
    if at_once == heads:
        results = function(*(x[0] for x in groups))
    else:
        results = jax.lax.map(lambda xs: function(*xs), groups)
    return [x.reshape(heads, batch, *x.shape[-2:]) for x in results]


def _logits(query: Array, key_t: Array, bias: Array | None) -> Array:
    logits = _matmul(query, key_t)
    if bias is None:
        return logits
    return logits + jnp.tile(bias, (len(query) // len(bias), 1, 1))


def _matmul(first: Float[Array, "n a b"], second: Float[Array, "n b c"]) -> Float[Array, "n a c"]:
    return jnp.einsum("nab,nbc->nac", first, second, preferred_element_type=jnp.float32)


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _scale_and_transpose(key: Array) -> Array:
    return _transpose(key * key.shape[-1] ** -0.5)
