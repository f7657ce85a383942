"""How cross-attention tells the tokens of several subject references apart: masks and maps.

Keys and values are those of all slots in a row, T tokens a slot.
"""

import jax
import jax.numpy as jnp

from focusdpo_jax.models import attention, layers


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

    seen = attention.attend(
        jnp.repeat(query, slots, axis=0),
        by_slot(key),
        by_slot(value),
        num_heads,
        key_mask=by_slot(key_mask),
    )
    seen = seen.reshape(batch, slots, positions, -1)
    return (seen * slot_masks[..., None].astype(seen.dtype)).sum(1)


def masks_on_grid(masks, grid):
    """Masks [B, S, H, W] on a grid (height, width) of positions: [B, S, height * width].

    Interpolated as diffusers' `IPAdapterMaskProcessor` does, so that values may leave [0, 1] at an
    edge. It guesses the grid from the masks' aspect and moves rows where that is not the picture's;
    here such masks are stretched over the picture.
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


def slot_attention(query, key, key_mask, num_heads, slots):
    """How strongly each position looks at each slot, before attention is normalised.

        log mean_t exp(query . key_t / sqrt(d))     over the slot's T tokens, mean over heads

    A share of the attention would tell several slots apart, but that of a picture's only slot is 1
    everywhere.

    Args:
      query: [B, N, C]; key: [B, slots * T, C].
      key_mask: bool [B, slots * T]; the tokens of a slot are valid together.

    Returns:
      [B, N, slots] in float32; 0 for a slot whose tokens are not valid.
    """
    with jax.named_scope("slot_attention"):
        query, key = attention.split_heads(query, num_heads), attention.split_heads(key, num_heads)
        logits = jnp.einsum("bnhd,bkhd->bhnk", query, key, preferred_element_type=jnp.float32)
        logits = (logits * query.shape[-1] ** -0.5).reshape(*logits.shape[:-1], slots, -1)
        mass = jax.nn.logsumexp(logits, axis=-1) - jnp.log(logits.shape[-1])
        valid = key_mask.reshape(len(key_mask), 1, slots, -1).any(-1)
        return jnp.where(valid, mass.mean(1), 0)
