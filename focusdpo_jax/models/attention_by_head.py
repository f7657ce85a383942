"""Attention that holds the logits of a few heads at a time, and none for the backward pass.

For CPUs. All heads' logits of many keys are far larger than a cache, and XLA writes and reads them
several times: so they are made for as many heads at a time as a cache may hold. The softmax of the
backward pass is computed again from its normaliser (as in flash attention, arXiv 2205.14135), so
that no logits are kept, and of few keys not even the output. And every product is one of two matrices as they lie in memory, the first
contracted over its last axis and the second over its rows, which XLA's CPU backend runs five to ten
times as fast as the one with both contracted over their rows, that of a gradient of keys and
values: what would have to be turned around, queries and gradients, is small, and is turned before.
`benchmarks/attention.py` shows it.
"""

import jax
import jax.numpy as jnp

# Logits at a time: 12 MiB (measured; a head of 1024 queries and keys of two pictures has 8).
_LOGITS = 3 * 2**20
# Up to so many keys it is cheaper to sum over them again than to keep the output (measured).
_FEW_KEYS = 128
# Added to the logit of a key that must not be seen.
_UNSEEN = -1e30


def attend(query, key, value, key_mask=None):
    """softmax(query key^T / sqrt(d)) value.

    Args:
      query: [B, Q, H, d]; key, value: [B, K, H, d].
      key_mask: bool [B, K], true where a key may be attended to. A row without such a key gets the
        mean of its values, which the caller has to discard.

    Returns:
      [B, Q, H, d].
    """
    bias = None if key_mask is None else jnp.where(key_mask, 0, _UNSEEN)[:, None, :]
    return _attend(query, key, value, bias)


@jax.custom_vjp
def _attend(query, key, value, bias):
    return _forward(query, key, value, bias)[0]


def _forward(query, key, value, bias):
    residuals = query, key, value, bias

    def heads(query, key_t, value):
        logits = _logits(query, key_t, bias)
        largest = logits.max(-1, keepdims=True)
        mass = jnp.exp(logits - largest)
        total = mass.sum(-1, keepdims=True)
        out = _product(mass.astype(value.dtype), value) / total
        return out.astype(value.dtype), largest + jnp.log(total)

    query, key, value = map(_by_head, (query, key, value))
    out, normaliser = _by_heads(
        heads, query.shape[2] * key.shape[2], query, _scaled_and_turned(key), value
    )
    out = out.transpose(1, 2, 0, 3)
    return out, (*residuals, normaliser, None if key.shape[2] <= _FEW_KEYS else out)


def _backward(residuals, gradient):
    query, key, value, bias, normaliser, out = residuals
    mean = (
        []
        if out is None
        else [_by_head((gradient * out).sum(-1, keepdims=True, dtype=jnp.float32))]
    )
    query, key, value, gradient = map(_by_head, (query, key, value, gradient))
    scale = query.shape[-1] ** -0.5

    def heads(query_t, key, key_t, value_t, normaliser, query, gradient, gradient_t, *mean):
        share = jnp.exp(_logits(query, key_t, bias) - normaliser)
        of_share = _product(gradient, value_t)
        mean = mean[0] if mean else (share * of_share).sum(-1, keepdims=True)
        inner = share * (of_share - mean)
        share, inner = share.astype(query.dtype), inner.astype(query.dtype)
        return _product(inner, key), _product(query_t, inner), _product(gradient_t, share)

    gradients = _by_heads(
        heads,
        query.shape[2] * key.shape[2],
        _turned(query),
        key,
        _scaled_and_turned(key),
        _turned(value),
        normaliser,
        query,
        gradient,
        _turned(gradient),
        *mean,
    )
    of_query, of_key, of_value = (x.astype(query.dtype) for x in gradients)
    return (
        (of_query * scale).transpose(1, 2, 0, 3),
        (of_key * scale).transpose(1, 3, 0, 2),
        of_value.transpose(1, 3, 0, 2),
        None,
    )


_attend.defvjp(_forward, _backward)


def _by_head(x):
    """[B, N, H, d] as [H, B, N, d]."""
    return x.transpose(2, 0, 1, 3)


def _by_heads(function, logits, *arrays):
    """`function` of arrays [h * B, ...], on all of [H, B, ...] with as many heads h as are held."""
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


def _logits(query, key_t, bias):
    logits = _product(query, key_t)
    if bias is None:
        return logits
    return logits + jnp.tile(bias, (len(query) // len(bias), 1, 1))


def _product(first, second):
    """[N, a, b] times [N, b, c]."""
    return jnp.einsum("nab,nbc->nac", first, second, preferred_element_type=jnp.float32)


def _turned(x):
    return x.swapaxes(-1, -2)


def _scaled_and_turned(key):
    return _turned(key * key.shape[-1] ** -0.5)
