"""Attention to the reference slots separately: with masks per slot, and as maps per slot.

Keys and values are those of all slots concatenated, T tokens per slot.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from focusdpo_jax.models import attention, layers


def attend_within_masks(
    query: Float[Array, "batch positions channels"],
    key: Float[Array, "batch keys channels"],
    value: Float[Array, "batch keys channels"],
    key_mask: Bool[Array, "batch keys"],
    slot_masks: Float[Array, "batch slots positions"],
    num_heads: int,
) -> Float[Array, "batch positions channels"]:
    """Computes attention with one softmax per slot, and sums over slots weighted by masks.

    Args:
      query: [B, N, C].
      key, value: [B, slots * T, C].
      key_mask: bool [B, slots * T].
      slot_masks: [B, slots, N], weight of each slot at each position.
      num_heads: number of heads.

    Returns:
      [B, N, C].
    """
    batch, slots, positions = slot_masks.shape

    def by_slot(x):
        return x.reshape(batch * slots, -1, *x.shape[2:])

    out = attention.attend(
        jnp.repeat(query, slots, axis=0),
        by_slot(key),
        by_slot(value),
        num_heads,
        key_mask=by_slot(key_mask),
    )
    out = out.reshape(batch, slots, positions, -1)
    return (out * slot_masks[..., None].astype(out.dtype)).sum(1)


def resize_masks(
    masks: Float[Array, "batch slots height width"], grid: tuple[int, int]
) -> Float[Array, "batch slots positions"]:
    """Resizes masks to the grid of a feature map, bicubic as diffusers' `IPAdapterMaskProcessor`.

    diffusers infers the grid from the aspect ratio of the masks, and shifts rows where it differs
    from the image's. Here such masks are stretched over the image.

    Args:
      masks: [B, S, H, W] in [0, 1].
      grid: (height, width) of the feature map.

    Returns:
      [B, S, height * width] in float32; values may leave [0, 1] at edges.
    """
    down, across = (layers.bicubic_weights(old, new) for old, new in zip(masks.shape[2:], grid))
    small = jnp.einsum(
        "bsyx,hy,wx->bshw",
        masks.astype(jnp.float32),
        down,
        across,
        precision=jax.lax.Precision.HIGHEST,
    )
    return small.reshape(*small.shape[:2], -1)


def slot_attention(
    query: Float[Array, "batch positions channels"],
    key: Float[Array, "batch keys channels"],
    key_mask: Bool[Array, "batch keys"],
    num_heads: int,
    slots: int,
) -> Float[Array, "batch positions slots"]:
    """Computes the unnormalised log attention of each position to each slot.

        log mean_t exp(query . key_t / sqrt(d))     over the slot's T tokens, mean over heads

    Normalised attention would distinguish several slots, but would be 1 everywhere for an image
    with a single slot.

    Args:
      query: [B, N, C].
      key: [B, slots * T, C].
      key_mask: bool [B, slots * T]; the tokens of a slot are all valid or all invalid.
      num_heads: number of heads.
      slots: number of slots.

    Returns:
      [B, N, slots] in float32; 0 for a slot whose tokens are not valid.
    """
    with jax.named_scope("slot_attention"):
        query, key = attention.split_heads(query, num_heads), attention.split_heads(key, num_heads)
        logits = jnp.einsum("bnhd,bkhd->bhnk", query, key, preferred_element_type=jnp.float32)
        logits = (logits * query.shape[-1] ** -0.5).reshape(*logits.shape[:-1], slots, -1)
        log_mean = jax.nn.logsumexp(logits, axis=-1) - jnp.log(logits.shape[-1])
        valid = key_mask.reshape(len(key_mask), 1, slots, -1).any(-1)
        return jnp.where(valid, log_mean.mean(1), 0)
