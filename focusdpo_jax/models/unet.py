"""SDXL's UNet with decoupled cross-attention to subject reference images.

The anatomy is that of `UNet2DConditionModel` as SDXL configures it (arXiv 2307.01952, layout of
the diffusers checkpoints); the image branch is IP-Adapter's (arXiv 2308.06721), with one group of
tokens, a slot, for every subject reference image.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import image_attention, layers, stacking
from focusdpo_jax.models.attention import attend
from focusdpo_jax.models.lora import LoRADense

IMAGE_ATTENTION = "image_attention"


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are SDXL base 1.0's.

    A "level" is a resolution, from that of the latents downwards. The sequences that describe
    the levels have one entry each.

    Attributes:
      in_channels, out_channels: of the latents and of the prediction.
      block_out_channels: width of each level.
      transformer_layers_per_block: transformer blocks after each resnet of the level, 0 for none.
      mid_transformer_layers: transformer blocks of the middle block, 0 for none; diffusers knows
        only as many as in the last level.
      layers_per_block: resnets of a level on the way down; there is one more on the way up.
      num_heads: attention heads of each level (SDXL's file calls them `attention_head_dim`).
      cross_attention_dim: width of the text and image tokens.
      addition_time_embed_dim: sinusoidal width of each of the six time ids.
      pooled_dim: width of the pooled text embedding.
      norm_groups: groups of every group normalisation.
      image_context: whether cross-attention also reads image tokens.
      lora_rank, lora_alpha: low-rank update of the attention projections; rank 0 for none.
      remat: recompute resnets and transformer blocks in the backward pass, and keep only what
        goes into each.
      scan_layers: run equal transformer blocks in a loop over stacked parameters, which compiles
        faster and runs slower, instead of one after the other (see `stacking`).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    transformer_layers_per_block: tuple[int, ...] = (0, 2, 10)
    mid_transformer_layers: int = 10
    layers_per_block: int = 2
    num_heads: tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    pooled_dim: int = 1280
    norm_groups: int = 32
    image_context: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    remat: bool = False
    scan_layers: bool = True

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for field in ("transformer_layers_per_block", "num_heads"):
            value = getattr(self, field)
            if len(value) != levels:
                raise UserError(
                    f"{field} = {value}: give {levels} entries, "
                    f"one a level of block_out_channels = {self.block_out_channels}"
                )
        for width, heads in zip(self.block_out_channels, self.num_heads):
            if width % self.norm_groups or width % heads:
                raise UserError(
                    f"block_out_channels = {self.block_out_channels}: {width} must be a multiple "
                    f"of norm_groups = {self.norm_groups} and of its num_heads = {heads}"
                )

    @property
    def image_attention_level(self):
        """The finest level that has cross-attention, where its map is captured."""
        depths = self.transformer_layers_per_block
        return next((i for i, depth in enumerate(depths) if depth), len(depths) - 1)

    @property
    def capture_names(self):
        """What `UNet.__call__` can capture."""
        levels = range(len(self.block_out_channels))
        names = [f"down_blocks_{i}" for i in levels] + ["mid_block"]
        names += [f"up_blocks_{i}" for i in levels]
        has_attention = any(self.transformer_layers_per_block) or self.mid_transformer_layers
        attention = self.image_context and has_attention
        return tuple(names) + ((IMAGE_ATTENTION,) if attention else ())


class Context(NamedTuple):
    """What cross-attention reads: the arguments of the same names of `UNet.__call__`."""

    text: Any
    image_tokens: Any = None
    image_present: Any = None
    image_scale: Any = None
    image_scales: Any = None
    image_masks: Any = None


class CrossAttention(nn.Module):
    """Cross-attention to text and, added to it, to the image tokens of each reference slot."""

    config: UNetConfig
    num_heads: int
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        """Maps tokens [B, N, C] to [B, N, C] and, if recorded, `slot_attention` [B, N, S]."""
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

        # Pictures of one condition ask together, of keys and values that are made once.
        query = dense(False, "to_q")(x).reshape(len(context.text), -1, width)
        key = dense(False, "to_k")(context.text)
        value = dense(False, "to_v")(context.text)
        out = attend(query, key, value, self.num_heads)
        attention = None
        if self.config.image_context:
            batch, slots, tokens, features = context.image_tokens.shape
            image = context.image_tokens.reshape(batch, slots * tokens, features)
            mask = jnp.repeat(context.image_present, tokens, axis=1)
            key = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_k_ip")(image)
            value = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_v_ip")(image)
            if context.image_scales is not None:
                scales = jnp.repeat(context.image_scales, tokens, axis=1)
                value = value * scales[:, :, None].astype(value.dtype)
            if context.image_masks is None:
                seen = attend(query, key, value, self.num_heads, key_mask=mask)
            else:
                seen = image_attention.attend_within_masks(
                    query, key, value, mask, context.image_masks, self.num_heads
                )
            out = out + jnp.asarray(context.image_scale, out.dtype) * seen
            if self.record:
                attention = image_attention.slot_attention(
                    query, key, mask, self.num_heads, slots
                ).reshape(*x.shape[:2], slots)
        return dense(True, "to_out_0")(out.reshape(x.shape)), attention


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward, each added to its input."""

    config: UNetConfig
    num_heads: int
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        """Maps tokens [B, N, C] to [B, N, C] and, if recorded, `slot_attention` [B, N, S]."""
        config = self.config
        among_themselves = layers.Attention(
            self.num_heads,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            dtype=self.dtype,
            name="attn1",
        )
        x = x + among_themselves(layers.LayerNorm(dtype=self.dtype, name="norm1")(x))
        cross = CrossAttention(config, self.num_heads, self.record, self.dtype, name="attn2")
        seen, attention = cross(layers.LayerNorm(dtype=self.dtype, name="norm2")(x), context)
        x = x + seen
        feed_forward = layers.FeedForward(dtype=self.dtype, name="ff")
        return x + feed_forward(layers.LayerNorm(dtype=self.dtype, name="norm3")(x)), attention


class SpatialTransformer(nn.Module):
    """A stack of transformer blocks over the positions of a feature map, added to it."""

    config: UNetConfig
    num_heads: int
    depth: int
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        """Maps [B, H, W, C] to the same shape and what was recorded, a list of [B, H, W, S]."""
        batch, height, width, channels = x.shape
        h = layers.GroupNorm(self.config.norm_groups, 1e-6, self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        h = nn.Dense(channels, dtype=self.dtype, name="proj_in")(h)
        if context.image_masks is not None:
            masks = image_attention.masks_on_grid(context.image_masks, (height, width))
            # Once for each of the pictures that ask together.
            context = context._replace(image_masks=jnp.tile(masks, batch // len(masks)))
        h, attentions = self._blocks(h, context)
        recorded = [one.reshape(batch, height, width, -1) for one in attentions]
        h = nn.Dense(channels, kernel_init=layers.ZEROS, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape), recorded

    def _blocks(self, h, context):
        """Tokens [B, N, C] through all blocks, and the `slot_attention` of each if recorded."""
        arguments = self.config, self.num_heads, self.record, self.dtype
        if self.config.scan_layers:
            # Inside a loop there is no other computation that a repeated one could be merged with.
            block = (
                nn.remat(TransformerBlock, prevent_cse=False)
                if self.config.remat
                else TransformerBlock
            )
            blocks = nn.scan(
                block,
                length=self.depth,
                in_axes=nn.broadcast,
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


class Stage(nn.Module):
    """One block of the UNet: resnets, each followed by a transformer where depth > 0.

    `kind` is "down" (ends in a downsampler if `resample`), "up" (takes a skip connection before
    each resnet, ends in an upsampler if `resample`) or "mid" (a resnet more than transformers).
    """

    config: UNetConfig
    kind: str
    level: int
    resample: bool
    record: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, embedding, context, skips=(), size=None):
        """Maps [B, H, W, C] to the next resolution.

        Args:
          embedding: [B, E], timestep and additional conditioning.
          skips: for "up", one map a resnet, in the order of use.
          size: for "up", (height, width) to upsample to.

        Returns:
          The output; the features of the last resnet or transformer; for "down", what the way up
          will take, in the order made; the recorded slot attention.
        """
        config = self.config
        depth = config.transformer_layers_per_block[self.level]
        resnets = attentions = config.layers_per_block
        if self.kind == "up":
            resnets = attentions = config.layers_per_block + 1
        elif self.kind == "mid":
            depth = config.mid_transformer_layers
            resnets, attentions = 2, 1
        made, recorded = [], []
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
                x, seen = SpatialTransformer(
                    config,
                    config.num_heads[self.level],
                    depth,
                    self.record,
                    self.dtype,
                    name=f"attentions_{i}",
                )(x, context)
                recorded += seen
            made.append(x)
        features = x
        if self.resample and self.kind == "down":
            x = layers.Downsample(dtype=self.dtype, name="downsamplers_0")(x)
            made.append(x)
        elif self.resample:
            x = layers.Upsample(dtype=self.dtype, name="upsamplers_0")(x, size)
        return x, features, made, recorded


class Embedding(nn.Module):
    """Two dense layers that turn a sinusoidal or pooled embedding into the UNet's."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, C] to [B, features]."""
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))


def _to_float32(x):
    """Casts to float32 without excess precision: values of x's own type.

    After a plain cast XLA may use the float32 value before its rounding to bfloat16, in one program and not
    in another. Prediction errors of policy and reference model would then differ at equal parameters.
    """
    if x.dtype == jnp.float32:
        return x
    own = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), own.nexp, own.nmant)


class UNet(nn.Module):
    """Predicts the noise (or the velocity) in latents from text and subject references."""

    config: UNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        sample,
        timesteps,
        text,
        pooled,
        time_ids,
        image_tokens=None,
        image_present=None,
        image_scale=1.0,
        *,
        image_scales=None,
        image_masks=None,
        capture=(),
    ):
        """Runs the network.

        Several pictures may have one condition, whose keys and values are then made once: the
        conditioning has C rows and the sample B = C * P, the P pictures of a row side by side.

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
          image_scales: [C, S], a further weight of each slot; None is 1.
          image_masks: [C, S, H', W'] in [0, 1], where each slot may show itself, in any size and
            the aspect of the picture. With masks every slot is attended to by itself, and the
            results are added (see `image_attention`); without, all share one softmax.
          capture: names from `config.capture_names`. A block's name gives the output
            [B, h, w, C] of its last resnet or transformer, before any resampling;
            "image_attention" how strongly each position looks at each slot [B, h, w, S] in
            float32 (`image_attention.slot_attention`), averaged over heads and over the
            cross-attention layers of the finest level that has any; masks and scales do not
            change it.

        Returns:
          The prediction [B, H, W, out_channels] in float32, and a dict of what was captured.

        Raises:
          ValueError: for an unknown name, or image tokens missing or given in vain.
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
        if config.image_context:
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
            x, captured[name], made, seen = stage("down", level, level < last, name)(
                x, embedding, context
            )
            skips += made
            recorded += seen
        x, captured["mid_block"], _, seen = stage("mid", last, False, "mid_block")(
            x, embedding, context
        )
        recorded += seen
        for i in range(last + 1):
            name, level = f"up_blocks_{i}", last - i
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            size = skips[-1].shape[1:3] if skips else None
            x, captured[name], _, seen = stage("up", level, level > 0, name)(
                x, embedding, context, taken, size
            )
            recorded += seen

        x = layers.GroupNorm(config.norm_groups, 1e-5, self.dtype, name="conv_norm_out")(x)
        x = layers.Conv(config.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))
        if recorded:
            captured[IMAGE_ATTENTION] = sum(recorded) / len(recorded)
        return _to_float32(x), {name: captured[name] for name in capture}

    def _embedding(self, timesteps, pooled, time_ids):
        """The sum of the embeddings of timestep and of pooled text with time ids: [B, E]."""
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
