"""The transformer blocks of SDXL's UNet, with decoupled cross-attention to subject references.

The layout is that of diffusers' `Transformer2DModel` and `BasicTransformerBlock`; the image branch
is IP-Adapter's (arXiv 2308.06721), with one group of tokens, a slot, for each reference image.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from focusdpo_jax.models import image_attention, layers, stacking
from focusdpo_jax.models.attention import attend
from focusdpo_jax.models.lora import LoRADense
from focusdpo_jax.models.unet_config import UNetConfig


class Context(NamedTuple):
    """Inputs of cross-attention; see the arguments of the same names of `UNet.__call__`.

    `SpatialTransformer` replaces `image_masks` by masks [B, S, N] on the grid of its feature map.
    """

    text: Float[Array, "conditions length width"]
    image_tokens: Float[Array, "conditions slots tokens width"] | None = None
    image_present: Bool[Array, "conditions slots"] | None = None
    image_scale: float | Float[Array, ""] | None = None
    image_scales: Float[Array, "conditions slots"] | None = None
    image_masks: Float[Array, "..."] | None = None


# Tokens of a feature map.
_Tokens = Float[Array, "batch positions channels"]
# `image_attention.slot_attention`, or None where it is not recorded.
_SlotAttention = Float[Array, "batch positions slots"] | None


class CrossAttention(nn.Module):
    """Decoupled cross-attention: attention to the text plus attention to the image tokens.

    Attributes:
      config: sizes of the UNet.
      num_heads: number of heads.
      record: whether to compute `slot_attention` for `UNet.__call__` to capture.
      dtype: type of the computation.
    """

    config: UNetConfig
    num_heads: int
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Tokens, context: Context) -> tuple[_Tokens, _SlotAttention]:
        """Returns tokens [B, N, C] and, if `record`, `slot_attention` [B, N, S]."""
        width = x.shape[-1]

        def dense(use_bias, name):
            return LoRADense(
                width,
                use_bias,
                self.config.lora_rank,
                self.config.lora_alpha,
                dtype=self.dtype,
                name=name,
            )

        # Batch the queries of images that share a condition; compute keys and values once.
        query = dense(False, "to_q")(x).reshape(len(context.text), -1, width)
        key = dense(False, "to_k")(context.text)
        value = dense(False, "to_v")(context.text)
        out = attend(query, key, value, self.num_heads)
        attention = None
        if self.config.image_context:
            assert context.image_tokens is not None and context.image_present is not None
            batch, slots, tokens, features = context.image_tokens.shape
            image = context.image_tokens.reshape(batch, slots * tokens, features)
            mask = jnp.repeat(context.image_present, tokens, axis=1)
            key = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_k_ip")(image)
            value = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_v_ip")(image)
            if context.image_scales is not None:
                scales = jnp.repeat(context.image_scales, tokens, axis=1)
                value = value * scales[:, :, None].astype(value.dtype)
            if context.image_masks is None:
                image_out = attend(query, key, value, self.num_heads, key_mask=mask)
            else:
                image_out = image_attention.attend_within_masks(
                    query, key, value, mask, context.image_masks, self.num_heads
                )
            out = out + jnp.asarray(context.image_scale, out.dtype) * image_out
            if self.record:
                attention = image_attention.slot_attention(
                    query, key, mask, self.num_heads, slots
                ).reshape(*x.shape[:2], slots)
        return dense(True, "to_out_0")(out.reshape(x.shape)), attention


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward, each normalised and residual.

    Attributes: see `CrossAttention`.
    """

    config: UNetConfig
    num_heads: int
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Tokens, context: Context) -> tuple[_Tokens, _SlotAttention]:
        """Returns tokens [B, N, C] and, if `record`, `slot_attention` [B, N, S]."""
        config = self.config
        self_attention = layers.Attention(
            self.num_heads,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            dtype=self.dtype,
            name="attn1",
        )
        x = x + self_attention(layers.LayerNorm(dtype=self.dtype, name="norm1")(x))
        cross = CrossAttention(config, self.num_heads, self.record, self.dtype, name="attn2")
        attended, attention = cross(layers.LayerNorm(dtype=self.dtype, name="norm2")(x), context)
        x = x + attended
        feed_forward = layers.FeedForward(dtype=self.dtype, name="ff")
        return x + feed_forward(layers.LayerNorm(dtype=self.dtype, name="norm3")(x)), attention


class SpatialTransformer(nn.Module):
    """A residual stack of transformer blocks over the positions of a feature map.

    Attributes:
      depth: number of blocks.
      config, num_heads, record, dtype: see `CrossAttention`.
    """

    config: UNetConfig
    num_heads: int
    depth: int
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], context: Context
    ) -> tuple[
        Float[Array, "batch height width channels"], list[Float[Array, "batch height width slots"]]
    ]:
        """Returns a feature map of the same shape and, if `record`, each block's slot attention."""
        batch, height, width, channels = x.shape
        h = layers.GroupNorm(self.config.norm_groups, 1e-6, self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        h = nn.Dense(channels, dtype=self.dtype, name="proj_in")(h)
        if context.image_masks is not None:
            masks = image_attention.resize_masks(context.image_masks, (height, width))
            # One copy for each image of a condition.
            context = context._replace(image_masks=jnp.tile(masks, batch // len(masks)))
        h, attentions = self._blocks(h, context)
        recorded = [one.reshape(batch, height, width, -1) for one in attentions]
        h = nn.Dense(channels, kernel_init=layers.ZEROS, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape), recorded

    def _blocks(
        self, h: _Tokens, context: Context
    ) -> tuple[_Tokens, list[Float[Array, "batch positions slots"]]]:
        """Applies all blocks; also returns the `slot_attention` of each, if `record`."""
        arguments = self.config, self.num_heads, self.record, self.dtype
        if self.config.scan_layers:
            # Inside a loop the recomputation cannot be merged with the forward pass, so that
            # remat needs no protection from common subexpression elimination.
            block = (
                nn.remat(TransformerBlock, prevent_cse=False)
                if self.config.remat
                else TransformerBlock
            )
            blocks = nn.scan(
                block,
                length=self.depth,
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            h, attention = blocks(*arguments, name=stacking.STACKED)(h, context)
            return h, [] if attention is None else list(attention)
        block = nn.remat(TransformerBlock) if self.config.remat else TransformerBlock
        attentions = []
        for i in range(self.depth):
            h, attention = block(*arguments, name=f"{stacking.STACKED}_{i}")(h, context)
            attentions += [] if attention is None else [attention]
        return h, attentions
