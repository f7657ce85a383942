"""The UNet against diffusers' UNet2DConditionModel, configured as SDXL is."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("diffusers", reason="parity is checked against diffusers")

import diffusers  # noqa: E402
import torch  # noqa: E402

from focusdpo_jax.models.unet import UNet, UNetConfig  # noqa: E402
from tests.parity import oracles  # noqa: E402

CONFIG = UNetConfig(
    block_out_channels=(16, 32, 48),
    transformer_layers_per_block=(0, 1, 2),
    mid_transformer_layers=2,
    layers_per_block=2,
    num_heads=(1, 2, 3),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
    pooled_dim=20,
    norm_groups=8,
)
SMALL = UNetConfig(
    block_out_channels=(16, 24),
    transformer_layers_per_block=(0, 1),
    mid_transformer_layers=1,
    layers_per_block=1,
    num_heads=(2, 3),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
    pooled_dim=20,
    norm_groups=8,
)


def peer(config):
    depths = config.transformer_layers_per_block
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    return oracles.randomised(
        diffusers.UNet2DConditionModel,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        transformer_layers_per_block=tuple(max(depth, 1) for depth in depths),
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_groups,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=(
            config.pooled_dim + 6 * config.addition_time_embed_dim
        ),
    )


def inputs(config, height, width):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return dict(
        sample=normal(2, height, width, 4),
        timesteps=np.array([7, 981], np.int32),
        text=normal(2, 7, config.cross_attention_dim),
        pooled=normal(2, config.pooled_dim),
        time_ids=np.array([[512, 384, 3, 5, 512, 384], [64, 96, 0, 9, 128, 96]], np.float32),
    )


def template(config, batch):
    return jax.eval_shape(UNet(config).init, jax.random.key(0), **batch)["params"]


def peer_output(model, batch, how=None, **conditions):
    """The peer's prediction; `how` goes to its forward, `conditions` beside the pooled text."""
    return oracles.nhwc(
        model(
            oracles.nchw(batch["sample"]),
            torch.from_numpy(batch["timesteps"]),
            torch.from_numpy(batch["text"]),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(batch["pooled"]),
                "time_ids": torch.from_numpy(batch["time_ids"]),
                **conditions,
            },
            **(how or {}),
        ).sample
    )


@pytest.mark.parametrize("config, height, width", [(CONFIG, 9, 14), (SMALL, 8, 6)])
def test_output(config, height, width):
    model, batch = peer(config), inputs(config, height, width)
    params = oracles.load(template(config, batch), oracles.tensors_of(model))
    ours, _ = jax.jit(UNet(config).apply)({"params": params}, **batch)
    assert oracles.relative_error(ours, peer_output(model, batch)) < oracles.TOLERANCE
