"""SDXL's UNet with decoupled cross-attention to subject reference images.

The architecture is that of diffusers' `UNet2DConditionModel` in SDXL's configuration (arXiv
2307.01952). The transformer blocks and their image branch are in `transformer`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focusdpo_jax.models import layers
from focusdpo_jax.models.transformer import Context, SpatialTransformer
from focusdpo_jax.models.unet_config import IMAGE_ATTENTION, UNetConfig


class Stage(nn.Module):
    """One block of the UNet: resnets, each followed by a transformer if the level has any.

    Attributes:
      config: sizes of the UNet.
      kind: "down" for an encoder block, "up" for a decoder block, which concatenates a skip
        connection before each resnet, or "mid" for the middle block, with one resnet more than
        transformers.
      level: index into the fields of `config` that have one entry per level.
      resample: whether a "down" block ends in a downsampler and an "up" block in an upsampler.
      record: whether to return the slot attention of every transformer block.
      dtype: type of the computation.
    """

    config: UNetConfig
    kind: str
    level: int
    resample: bool
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        embedding: Float[Array, "batch embedding"],
        context: Context,
        skips: Sequence[Float[Array, "batch height width _"]] = (),
        size: tuple[int, int] | None = None,
    ) -> tuple[
        Float[Array, "batch new_height new_width features"],
        Float[Array, "batch height width features"],
        list[Float[Array, "batch _ _ features"]],
        list[Float[Array, "batch height width slots"]],
    ]:
        """Maps a feature map [B, H, W, C] to the next resolution.

        Args:
          embedding: [B, E], of the timestep and the additional conditioning.
          skips: for "up", the skip connection of each resnet in order.
          size: for "up", (height, width) to upsample to.

        Returns:
          The output; the features of the last resnet or transformer, before resampling; the outputs
          of every resnet (or its transformer) and of the downsampler, which are the skip
          connections of a "down" block; and the recorded slot attention.
        """
        config = self.config
        depth = config.transformer_layers_per_block[self.level]
        resnets = attentions = config.layers_per_block
        if self.kind == "up":
            resnets = attentions = config.layers_per_block + 1
        elif self.kind == "mid":
            depth = config.mid_transformer_layers
            resnets, attentions = 2, 1
        outputs, recorded = [], []
        resnet = nn.remat(layers.ResnetBlock) if config.remat else layers.ResnetBlock
        for i in range(resnets):
            if skips:
                x = jnp.concatenate([x, skips[i]], axis=-1)
            x = resnet(
                config.block_out_channels[self.level],
                config.norm_groups,
                1e-5,
                self.dtype,
                name=f"resnets_{i}",
            )(x, embedding)
            if depth and i < attentions:
                x, attention = SpatialTransformer(
                    config,
                    config.num_heads[self.level],
                    depth,
                    self.record,
                    self.dtype,
                    name=f"attentions_{i}",
                )(x, context)
                recorded += attention
            outputs.append(x)
        features = x
        if self.resample and self.kind == "down":
            x = layers.Downsample(dtype=self.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        elif self.resample:
            x = layers.Upsample(dtype=self.dtype, name="upsamplers_0")(x, size)
        return x, features, outputs, recorded


class Embedding(nn.Module):
    """A two-layer MLP over a sinusoidal or pooled embedding (diffusers' `TimestepEmbedding`)."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch channels"]) -> Float[Array, "batch features"]:
        """Maps [B, C] to [B, features]."""
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))


def _to_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Casts to float32 without excess precision: the values are those of x's own type.

    After a plain cast XLA may use the float32 value from before the rounding to bfloat16, in one
    program and not in another. The prediction errors of policy and reference model would then
    differ at equal parameters.
    """
    if x.dtype == jnp.float32:
        return x
    own = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), own.nexp, own.nmant)


class UNet(nn.Module):
    """Predicts the noise, or the velocity, in noisy latents.

    Attributes:
      config: sizes.
      dtype: type of the computation; parameters are created in float32.
    """

    config: UNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "batch height width in_channels"],
        timesteps: Float[Array, " batch"] | Int[Array, " batch"],
        text: Float[Array, "conditions length text_width"],
        pooled: Float[Array, "conditions pooled"],
        time_ids: Float[Array, "conditions 6"],
        image_tokens: Float[Array, "conditions slots tokens token_width"] | None = None,
        image_present: Bool[Array, "conditions slots"] | None = None,
        image_scale: float | Float[Array, ""] = 1.0,
        *,
        image_scales: Float[Array, "conditions slots"] | None = None,
        image_masks: Float[Array, "conditions slots mask_height mask_width"] | None = None,
        capture: Sequence[str] = (),
    ) -> tuple[Float[Array, "batch height width out_channels"], dict[str, Array]]:
        """Runs the network.

        Several images may share one condition, whose keys and values are then computed once: the
        conditioning has C rows and the sample B = C * P, with the P images of a row next to each
        other.

        Args:
          sample: [B, H, W, in_channels] noisy latents. H and W need not be powers of two.
          timesteps: [B] in [0, 1000).
          text: [C, L, cross_attention_dim] prompt embeddings.
          pooled: [C, pooled_dim] pooled prompt embedding.
          time_ids: [C, 6] original height and width, crop top and left, target height and width,
            in pixels.
          image_tokens: [C, S, T, cross_attention_dim], T tokens for each of S reference slots;
            needed if and only if `config.image_context`.
          image_present: bool [C, S]; a slot that is absent contributes nothing.
          image_scale: weight of the image branch.
          image_scales: [C, S], a weight of each slot, multiplied with `image_scale`; None is 1.
          image_masks: [C, S, H', W'] in [0, 1], weight of each slot at each position of the image,
            in any size and the image's aspect ratio. With masks each slot has a softmax of its own,
            and the results are added (see `image_attention`); without, all slots share one softmax.
          capture: names from `config.capture_names`. The name of a block captures the output
            [B, h, w, C] of its last resnet or transformer, before any resampling.
            "image_attention" captures the attention of each position to each slot [B, h, w, S] in
            float32 (`image_attention.slot_attention`), averaged over heads and over the
            cross-attention layers of the finest level that has any; masks and scales do not
            change it.

        Returns:
          The prediction [B, H, W, out_channels] in float32, and a dict of the captured arrays.

        Raises:
          ValueError: a name in `capture` is unknown, or image tokens are given without
            `config.image_context` or missing with it.
        """
        config = self.config
        unknown = set(capture) - set(config.capture_names)
        if unknown:
            raise ValueError(f"cannot capture {sorted(unknown)}; known: {config.capture_names}")
        if config.image_context != (image_tokens is not None and image_present is not None):
            raise ValueError(
                "give image_tokens and image_present if and only if "
                f"image_context is set (it is {config.image_context})"
            )
        embedding = self._embedding(timesteps, pooled, time_ids)
        context = Context(text.astype(self.dtype))
        if image_tokens is not None and image_present is not None:
            context = Context(
                context.text,
                image_tokens.astype(self.dtype),
                image_present.astype(bool),
                image_scale,
                image_scales,
                image_masks,
            )

        captured, recorded = {}, []
        last = len(config.block_out_channels) - 1

        def stage(kind, level, resample, name):
            record = IMAGE_ATTENTION in capture and level == config.image_attention_level
            return Stage(config, kind, level, resample, record, self.dtype, name=name)

        x = layers.Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(sample)
        skips = [x]
        for level in range(last + 1):
            name = f"down_blocks_{level}"
            x, captured[name], outputs, attention = stage("down", level, level < last, name)(
                x, embedding, context
            )
            skips += outputs
            recorded += attention
        x, captured["mid_block"], _, attention = stage("mid", last, False, "mid_block")(
            x, embedding, context
        )
        recorded += attention
        for i in range(last + 1):
            name, level = f"up_blocks_{i}", last - i
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x, captured[name], _, attention = stage("up", level, level > 0, name)(
                x, embedding, context, taken, size
            )
            recorded += attention

        x = layers.GroupNorm(config.norm_groups, 1e-5, self.dtype, name="conv_norm_out")(x)
        x = layers.Conv(config.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))
        if recorded:
            captured[IMAGE_ATTENTION] = sum(recorded) / len(recorded)
        return _to_float32(x), {name: captured[name] for name in capture}

    def _embedding(
        self,
        timesteps: Float[Array, " batch"] | Int[Array, " batch"],
        pooled: Float[Array, "conditions pooled"],
        time_ids: Float[Array, "conditions 6"],
    ) -> Float[Array, "batch embedding"]:
        """Returns the timestep embedding plus that of pooled text and time ids."""
        config = self.config
        width = 4 * config.block_out_channels[0]
        time = layers.sinusoidal_embedding(timesteps, config.block_out_channels[0])
        ids = layers.sinusoidal_embedding(time_ids.reshape(-1), config.addition_time_embed_dim)
        ids = ids.reshape(time_ids.shape[0], -1)
        added = jnp.concatenate([pooled.astype(jnp.float32), ids], axis=-1)
        added = Embedding(width, self.dtype, name="add_embedding")(added)
        return Embedding(width, self.dtype, name="time_embedding")(time) + jnp.repeat(
            added, len(time) // len(added), axis=0
        )
