"""Multi-head attention: one function for all networks, and the kernel that suits the target device.

| kernel | where | never holds the logits of |
| --- | --- | --- |
| `by_head` | CPU (`attention_by_head`) | more heads than fit a cache |
| `splash` | TPU, JAX's Pallas kernel (`attention_on_tpu`) | any query |
| `cudnn` | NVIDIA GPUs from Ampere on, half precision | any query |
| `xla` | everything else | more than `MOST_LOGITS`, where a loop over queries avoids it |

`choose_kernel` decides from the target that a program is traced for, never from this machine's devices, so
that the choice can be tested, and programs compiled, where that device is missing.
`benchmarks/attention_kernels.py` prints the choice for every attention of SDXL.
"""

import contextlib
import contextvars
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from focusdpo_jax.models import attention_by_head, attention_on_tpu, platforms

# Keys from which a fused kernel is chosen: text and image tokens are fewer, their logits small.
FUSED_FROM = 256
# Logits of one example that are held at once: 128 MiB in float32.
MOST_LOGITS = 2**25
# cuDNN's flash attention: widest head, and the multiple that its width must be.
_CUDNN_HEAD, _CUDNN_MULTIPLE = 128, 8


class Call(NamedTuple):
    """One attention of a traced program; see `recorded_calls`.

    Attributes:
      queries, keys, heads, head_dim: sizes.
      dtype: name of the type of queries, keys and values.
      masked, causal: whether keys are masked, or seen up to the query's position only.
      kernel: see `choose_kernel`.
    """

    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: str
    masked: bool
    causal: bool
    kernel: str


_CALLS = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def recorded_calls():
    """Yields a set, to which every attention that is traced inside adds its `Call`."""
    token = _CALLS.set(set())
    try:
        yield _CALLS.get()
    finally:
        _CALLS.reset(token)


def choose_kernel(
    target, dtype, queries, keys, head_dim, *, masked=False, causal=False, divided=False
):
    """The kernel for an attention, forward and backward.

    Args:
      target: `platforms.Target`.
      dtype: of queries, keys and values.
      queries, keys: lengths.
      head_dim: channels of a head.
      masked, causal: whether keys are masked, or seen up to the query's position only.
      divided: whether the caller divides an opaque kernel among devices (`platforms.target_platform`).

    Returns:
      "by_head", "splash", "cudnn", "cudnn-forward" (cuDNN's backward pass takes no odd lengths: it is
      chosen for inference, and "xla" where the same attention is differentiated) or "xla".
    """
    if target.platform == "cpu":
        return "xla" if causal else "by_head"
    if masked or causal or keys < FUSED_FROM:
        return "xla"
    if target.platform == "tpu":
        suits = divided and attention_on_tpu.suits(queries, keys, head_dim)
        return "splash" if suits else "xla"
    if (
        (target.compute_capability or 0) >= 8
        and dtype in (jnp.bfloat16, jnp.float16)
        and head_dim <= _CUDNN_HEAD
        and head_dim % _CUDNN_MULTIPLE == 0
    ):
        return "cudnn-forward" if queries % 2 or keys % 2 else "cudnn"
    return "xla"


def split_heads(x, num_heads):
    """[B, N, heads * d] -> [B, N, heads, d]."""
    return x.reshape(*x.shape[:2], num_heads, x.shape[-1] // num_heads)


def attend(query, key, value, num_heads, *, key_mask=None, causal=False):
    """Multi-head attention on projected queries, keys and values.

    Args:
      query: [B, Q, C]; key, value: [B, K, C]. C is a multiple of `num_heads`.
      key_mask: bool [B, K], true where a key may be attended to. Where a row has no such key its
        output and its gradients are exactly zero.
      causal: whether a query sees only the keys up to its own position.

    Returns:
      [B, Q, C].
    """
    heads = [split_heads(x, num_heads) for x in (query, key, value)]
    queries, keys, head_dim = query.shape[1], key.shape[1], heads[0].shape[-1]
    masked, divide = key_mask is not None, platforms.divide()
    kernel = choose_kernel(
        platforms.current(),
        query.dtype,
        queries,
        keys,
        head_dim,
        masked=masked,
        causal=causal,
        divided=divide is not None,
    )
    if _CALLS.get() is not None:
        _CALLS.get().add(
            Call(queries, keys, num_heads, head_dim, query.dtype.name, masked, causal, kernel)
        )
    if kernel == "by_head":
        out = _in_pieces(attention_by_head.attend, 1, *heads, key_mask)
    elif kernel == "splash":
        out = divide(attention_on_tpu.attend)(*heads)
    elif kernel == "cudnn":
        out = _cudnn(*heads)
    elif kernel == "cudnn-forward":
        out = _cudnn_forward(*heads)
    else:
        out = _in_pieces(functools.partial(_xla, causal=causal), num_heads, *heads, key_mask)
    out = out.reshape(query.shape)
    if key_mask is None:
        return out
    # Over no valid key the softmax is uniform over the masked ones: their mean is no answer.
    return jnp.where(key_mask.any(-1)[:, None, None], out, 0)


def _xla(query, key, value, key_mask=None, causal=False):
    """Plain attention, [B, N, H, d]; the backward pass computes the logits again."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.checkpoint(
        functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")
    )(query, key, value, mask=mask)


def _cudnn(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@jax.custom_vjp
def _cudnn_forward(query, key, value):
    return _cudnn(query, key, value)


def _differentiated(query, key, value):
    return _in_pieces(_xla, query.shape[2], query, key, value, None), (query, key, value)


def _gradients(residuals, gradient):
    return jax.vjp(lambda *x: _differentiated(*x)[0], *residuals)[1](gradient)


_cudnn_forward.defvjp(_differentiated, _gradients)


def _in_pieces(kernel, heads_at_once, query, key, value, key_mask):
    """`kernel` of [B, N, H, d], on as many queries at a time as `MOST_LOGITS` allows.

    The autoencoder's one head over 128 x 128 positions has 1 GiB of logits for an image.
    """
    batch, queries, *rest = query.shape
    most = max(MOST_LOGITS // (heads_at_once * key.shape[1]), 1)
    if queries <= most:
        return kernel(query, key, value, key_mask)
    size = next(size for size in range(most, 0, -1) if queries % size == 0)
    pieces = query.reshape(batch, queries // size, size, *rest).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda piece: kernel(piece, key, value, key_mask)), pieces)
    return out.swapaxes(0, 1).reshape(batch, queries, *out.shape[3:])
