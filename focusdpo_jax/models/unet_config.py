"""Sizes of SDXL's UNet."""

import dataclasses

from focusdpo_jax.errors import UserError

# The name under which `UNet.__call__` captures the attention to each reference slot.
IMAGE_ATTENTION = "image_attention"


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are SDXL base 1.0's.

    The fields are named as in diffusers' `UNet2DConditionModel`. A "level" is a resolution; level 0
    is that of the latents. Fields that are tuples have one entry per level.

    Attributes:
      in_channels, out_channels: channels of the input latents and of the prediction.
      block_out_channels: channels of each level.
      transformer_layers_per_block: transformer blocks after each resnet of the level, 0 for none.
      mid_transformer_layers: transformer blocks of the middle block, 0 for none; diffusers supports
        only the number of the last level.
      layers_per_block: resnets of a level in the encoder; the decoder has one more.
      num_heads: attention heads of each level (`attention_head_dim` in SDXL's file).
      cross_attention_dim: width of the text and image tokens.
      addition_time_embed_dim: sinusoidal width of each of the six time ids.
      pooled_dim: width of the pooled text embedding.
      norm_groups: groups of every group normalisation.
      image_context: whether cross-attention also reads image tokens.
      lora_rank, lora_alpha: low-rank updates of the attention projections; rank 0 for none.
      remat: recompute resnets and transformer blocks in the backward pass; only their inputs are
        saved.
      scan_layers: run equal transformer blocks as a loop over stacked parameters instead of
        unrolled: it compiles faster and runs slower (see `stacking`).

    Raises:
      UserError: fields disagree.
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
                    f"one per level of block_out_channels = {self.block_out_channels}"
                )
        for width, heads in zip(self.block_out_channels, self.num_heads):
            if width % self.norm_groups or width % heads:
                raise UserError(
                    f"block_out_channels = {self.block_out_channels}: {width} must be a multiple "
                    f"of norm_groups = {self.norm_groups} and of its num_heads = {heads}"
                )

    @property
    def image_attention_level(self) -> int:
        """The finest level with cross-attention; "image_attention" is captured there."""
        depths = self.transformer_layers_per_block
        return next((i for i, depth in enumerate(depths) if depth), len(depths) - 1)

    @property
    def capture_names(self) -> tuple[str, ...]:
        """Valid entries of `capture` in `UNet.__call__`."""
        levels = range(len(self.block_out_channels))
        names = [f"down_blocks_{i}" for i in levels] + ["mid_block"]
        names += [f"up_blocks_{i}" for i in levels]
        has_attention = any(self.transformer_layers_per_block) or self.mid_transformer_layers
        attention = self.image_context and has_attention
        return tuple(names) + ((IMAGE_ATTENTION,) if attention else ())
