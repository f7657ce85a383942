"""Attention for TPUs without stored logits: splash attention, JAX's Pallas kernel.

At 1024 pixels the logits of one image in one of SDXL's finer layers are 671 MB, which XLA writes
and reads several times. The kernel holds one block of them at a time in the chip's fast memory, in
the backward pass as well. XLA's partitioner cannot partition such a kernel, so that a caller that
compiles for several devices has to (`platforms.target_platform`).
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float

# Most positions of a block; a kernel's tiles are 128 wide.
LARGEST, TILE = 1024, 128
WIDEST_HEAD = 128
# The kernel reads queries, keys and values with the positions last, [B, H, d, N]. A last axis of 64
# channels would be padded to 128 in memory, in values stored for the backward pass too. XLA's dense
# layers return this layout, which then needs no transposition.
_LAYOUT = splash.QKVLayout.SEQ_MINOR


def supports(queries: int, keys: int, head_dim: int) -> bool:
    """Returns whether the kernel supports these lengths and this head dimension."""
    return queries % TILE == keys % TILE == 0 and head_dim <= WIDEST_HEAD


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes softmax(query key^T / sqrt(d)) value per head, over all keys.

    Args:
      query: [B, Q, H, d].
      key, value: [B, K, H, d]. The sizes must satisfy `supports`.
      interpret: run the kernel in Pallas's interpreter, on any platform, for tests.

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
        q_layout=_LAYOUT,
        k_layout=_LAYOUT,
        v_layout=_LAYOUT,
    )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
        block_sizes=sizes,
        interpret=interpret,
    )
    query, key, value = (x.swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value))
    out = jax.vmap(kernel)(query, key, value)
    return out.swapaxes(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def _block(count: int) -> int:
    """Returns the largest block that divides `count` positions."""
    return next(size for size in range(min(LARGEST, count), 0, -TILE) if count % size == 0)
