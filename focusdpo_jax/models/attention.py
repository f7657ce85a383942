"""Multi-head attention for all networks, with a kernel chosen for the target device.

| kernel | platform | logits held in memory at once |
| --- | --- | --- |
| `by_head` | CPU (`attention_by_head`) | those of as many heads as fit a cache |
| `splash` | TPU, JAX's Pallas kernel (`attention_on_tpu`) | none: one block in fast memory |
| `cudnn` | NVIDIA GPUs from Ampere on, half precision | none: one block in fast memory |
| `xla` | everything else | all up to `MOST_LOGITS`, else a chunk of the queries |

`choose_kernel` decides from the target that a program is traced for, never from this machine's
devices. So the choice can be tested, and programs compiled, without that device.
`benchmarks/attention_kernels.py` prints the choice for every attention of SDXL.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from focusdpo_jax.models import attention_by_head, attention_on_tpu, platforms

# Fewest keys for a fused kernel. Text and image tokens are fewer, and their logits small.
FUSED_FROM = 256
# Most logits of one example that are held at once: 128 MiB in float32.
MOST_LOGITS = 2**25
# cuDNN's flash attention: largest head dimension, and the divisor that it must have.
_CUDNN_HEAD, _CUDNN_MULTIPLE = 128, 8


class Call(NamedTuple):
    """Sizes and kernel of one attention in a traced program; see `recorded_calls`.

    Attributes:
      queries, keys, heads, head_dim: sizes.
      dtype: name of the type of queries, keys and values.
      masked: whether there is a key mask.
      causal: whether each query attends only to keys up to its own position.
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


_CALLS: contextvars.ContextVar[set[Call] | None] = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def recorded_calls() -> Iterator[set[Call]]:
    """Yields a set that collects the `Call` of every attention traced inside the context."""
    calls: set[Call] = set()
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def choose_kernel(
    target: platforms.Target,
    dtype: Any,
    queries: int,
    keys: int,
    head_dim: int,
    *,
    masked: bool = False,
    causal: bool = False,
    partitioned: bool = False,
) -> str:
    """Chooses the kernel of an attention, forward and backward.

    Args:
      target: the device that the program is compiled for.
      dtype: type of queries, keys and values.
      queries, keys: lengths.
      head_dim: channels of a head.
      masked: whether there is a key mask.
      causal: whether each query attends only to keys up to its own position.
      partitioned: whether the caller partitions opaque kernels over the devices of the program
        (`platforms.target_platform`).

    Returns:
      "by_head", "splash", "cudnn", "cudnn-forward" or "xla". "cudnn-forward" is for odd lengths,
      which cuDNN's backward pass does not support: the forward pass of inference runs in cuDNN, and
      under differentiation both passes run in XLA.
    """
    if target.platform == "cpu":
        return "xla" if causal else "by_head"
    if masked or causal or keys < FUSED_FROM:
        return "xla"
    if target.platform == "tpu":
        supported = partitioned and attention_on_tpu.supports(queries, keys, head_dim)
        return "splash" if supported else "xla"
    if (
        (target.compute_capability or 0) >= 8
        and dtype in (jnp.bfloat16, jnp.float16)
        and head_dim <= _CUDNN_HEAD
        and head_dim % _CUDNN_MULTIPLE == 0
    ):
        return "cudnn-forward" if queries % 2 or keys % 2 else "cudnn"
    return "xla"


# One array by head, [B, N, H, d].
_Heads = Float[Array, "batch _ heads head_dim"]


def split_heads(
    x: Float[Array, "batch length channels"], num_heads: int
) -> Float[Array, "batch length heads head_dim"]:
    """Reshapes [B, N, heads * d] to [B, N, heads, d]."""
    return x.reshape(*x.shape[:2], num_heads, x.shape[-1] // num_heads)


def attend(
    query: Float[Array, "batch queries channels"],
    key: Float[Array, "batch keys channels"],
    value: Float[Array, "batch keys channels"],
    num_heads: int,
    *,
    key_mask: Bool[Array, "batch keys"] | None = None,
    causal: bool = False,
) -> Float[Array, "batch queries channels"]:
    """Computes multi-head attention, softmax(query key^T / sqrt(d)) value per head.

    Args:
      query: projected queries [B, Q, C]; C is a multiple of `num_heads`.
      key, value: projected keys and values [B, K, C].
      num_heads: number of heads.
      key_mask: bool [B, K], true where a key may be attended to. The output and the gradients of a
        row without any such key are exactly zero.
      causal: whether each query attends only to keys up to its own position.

    Returns:
      [B, Q, C].
    """
    by_head = (
        split_heads(query, num_heads),
        split_heads(key, num_heads),
        split_heads(value, num_heads),
    )
    queries, keys, head_dim = query.shape[1], key.shape[1], by_head[0].shape[-1]
    masked, partition = key_mask is not None, platforms.partition()
    kernel = choose_kernel(
        platforms.current(),
        query.dtype,
        queries,
        keys,
        head_dim,
        masked=masked,
        causal=causal,
        partitioned=partition is not None,
    )
    if (calls := _CALLS.get()) is not None:
        calls.add(
            Call(queries, keys, num_heads, head_dim, query.dtype.name, masked, causal, kernel)
        )
    if kernel == "by_head":
        out = _chunk_queries(attention_by_head.attend, 1, *by_head, key_mask)
    elif kernel == "splash":
        assert partition is not None  # `choose_kernel` requires it.
        out = partition(attention_on_tpu.attend)(*by_head)
    elif kernel == "cudnn":
        out = _cudnn(*by_head)
    elif kernel == "cudnn-forward":
        out = _cudnn_forward(*by_head)
    else:
        out = _chunk_queries(functools.partial(_xla, causal=causal), num_heads, *by_head, key_mask)
    out = out.reshape(query.shape)
    if key_mask is None:
        return out
    # Without a valid key the softmax is uniform over the masked keys; discard their mean.
    return jnp.where(key_mask.any(-1)[:, None, None], out, 0)


def _xla(
    query: _Heads,
    key: _Heads,
    value: _Heads,
    key_mask: Bool[Array, "batch keys"] | None = None,
    causal: bool = False,
) -> _Heads:
    """Plain attention; the backward pass recomputes the logits."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.checkpoint(
        functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")
    )(query, key, value, mask=mask)


def _cudnn(query: _Heads, key: _Heads, value: _Heads) -> _Heads:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@jax.custom_vjp
def _cudnn_forward(query: _Heads, key: _Heads, value: _Heads) -> _Heads:
    return _cudnn(query, key, value)


def _xla_with_residuals(query, key, value):
    return _chunk_queries(_xla, query.shape[2], query, key, value, None), (query, key, value)


def _xla_gradients(residuals, gradient):
    return jax.vjp(lambda *x: _xla_with_residuals(*x)[0], *residuals)[1](gradient)


_cudnn_forward.defvjp(_xla_with_residuals, _xla_gradients)


def _chunk_queries(
    kernel: Callable[..., _Heads],
    heads_at_once: int,
    query: _Heads,
    key: _Heads,
    value: _Heads,
    key_mask: Bool[Array, "batch keys"] | None,
) -> _Heads:
    """Runs `kernel` on as many queries at a time as `MOST_LOGITS` allows.

    For example, the autoencoder's single head over 128 x 128 positions has 1 GiB of logits per
    image.
    """
    batch, queries, *rest = query.shape
    most = max(MOST_LOGITS // (heads_at_once * key.shape[1]), 1)
    if queries <= most:
        return kernel(query, key, value, key_mask)
    size = next(size for size in range(most, 0, -1) if queries % size == 0)
    chunks = query.reshape(batch, queries // size, size, *rest).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda chunk: kernel(chunk, key, value, key_mask)), chunks)
    return out.swapaxes(0, 1).reshape(batch, queries, *out.shape[3:])
