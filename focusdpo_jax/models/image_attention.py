"""How cross-attention tells the tokens of several subject references apart: masks and shares.

Keys and values are those of all slots in a row, T tokens a slot.
"""

import jax
import jax.numpy as jnp

from focusdpo_jax.models import layers


def attend_within_masks(query, key, value, key_mask, slot_masks, num_heads):
    """Attention to the tokens of each slot by themselves, weighted by its mask and summed.

    Args:
      query: [B, N, C]; key, value: [B, slots * T, C].
      key_mask: bool [B, slots * T].
      slot_masks: [B, slots, N], weight of each slot at each position.

    Returns:
      [B, N, C].
    """
    batch, slots, positions = slot_masks.shape

    def by_slot(x):
        return x.reshape(batch * slots, -1, *x.shape[2:])

    seen = layers.attend(jnp.repeat(query, slots, axis=0), by_slot(key), by_slot(value), num_heads,
                         key_mask=by_slot(key_mask))
    seen = seen.reshape(batch, slots, positions, -1)
    return (seen * slot_masks[..., None].astype(seen.dtype)).sum(1)


def masks_on_grid(masks, grid):
    """Masks [B, S, H, W] on a grid (height, width) of positions: [B, S, height * width].

    Interpolated as diffusers' `IPAdapterMaskProcessor` does, so that values may leave [0, 1] at an
    edge. It guesses the grid from the masks' aspect and moves rows where that is not the picture's;
    here such masks are stretched over the picture.
    """
    down, across = (layers.bicubic_weights(old, new) for old, new in zip(masks.shape[2:], grid))
    small = jnp.einsum("bsyx,hy,wx->bshw", masks.astype(jnp.float32), down, across,
                       precision=jax.lax.Precision.HIGHEST)
    return small.reshape(*small.shape[:2], -1)


def slot_shares(query, key, key_mask, num_heads, slots):
    """Share of the attention that falls on each slot's tokens, averaged over heads.

    Args:
      query: [B, N, C]; key: [B, slots * T, C].
      key_mask: bool [B, slots * T].

    Returns:
      [B, N, slots] in float32; rows sum to 1, or are zero where no key is valid.
    """
    query, key = layers.split_heads(query, num_heads), layers.split_heads(key, num_heads)
    logits = jnp.einsum("bnhd,bkhd->bhnk", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    mask = key_mask[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1) * mask
    weights = weights.mean(1)
    return weights.reshape(*weights.shape[:2], slots, -1).sum(-1)
