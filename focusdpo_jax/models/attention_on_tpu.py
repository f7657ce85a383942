"""Attention for TPUs that never holds the logits: splash attention, JAX's own Pallas kernel.

At 1024 pixels the logits of one picture in one of SDXL's finer layers are 671 MB, which XLA writes and
reads several times over. Here a block of them at a time is in the chip's fast memory, in the backward
pass as well. XLA's partitioner cannot look into such a kernel: whoever compiles for several devices
says how it is divided (`platforms.target_platform`).
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

# Positions of a block; a kernel's tiles are 128 wide.
LARGEST, TILE = 1024, 128
WIDEST_HEAD = 128


def suits(queries, keys, head_dim):
    """Whether there is a kernel for so many queries and keys, and heads of so many channels."""
    return queries % TILE == keys % TILE == 0 and head_dim <= WIDEST_HEAD


def attend(query, key, value, *, interpret=False):
    """softmax(query key^T / sqrt(d)) value for each head, over all keys.

    Args:
      query: [B, Q, H, d]; key, value: [B, K, H, d], as `suits` allows them.
      interpret: run the kernel step by step, on any platform, which is for tests.

    Returns:
      [B, Q, H, d].
    """
    _, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    q, k = _block(queries), _block(keys)
    sizes = splash.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=k,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=k,
        block_q_dq=q,
        block_kv_dq=k,
    )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
        block_sizes=sizes,
        interpret=interpret,
    )
    query, key, value = (x.swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value))
    return jax.vmap(kernel)(query, key, value).swapaxes(1, 2)


def _block(count):
    """The largest block that divides `count` positions."""
    return next(size for size in range(min(LARGEST, count), 0, -TILE) if count % size == 0)
