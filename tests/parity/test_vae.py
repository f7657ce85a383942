"""The autoencoder against diffusers' AutoencoderKL."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("diffusers", reason="parity is checked against diffusers")

import diffusers  # noqa: E402

from focusdpo_jax.models.vae import VAE, VAEConfig  # noqa: E402
from tests.parity import oracles  # noqa: E402

CONFIG = VAEConfig(block_out_channels=(8, 16, 24), layers_per_block=2, norm_groups=4)


@pytest.mark.parametrize(
    "config", [CONFIG, dataclasses.replace(CONFIG, layers_per_block=1, mid_attention=False)]
)
def test_encode_and_decode(config):
    levels = len(config.block_out_channels)
    model = oracles.randomised(
        diffusers.AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.mid_attention,
    )
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 4, 6, config.latent_channels)).astype(np.float32)
    vae = VAE(config)
    template = jax.eval_shape(vae.init, jax.random.key(0), images)["params"]
    params = oracles.load(template, oracles.tensors_of(model))

    mean, log_variance = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))(
        params, images
    )
    posterior = model.encode(oracles.nchw(images)).latent_dist
    assert oracles.relative_error(mean, oracles.nhwc(posterior.mean)) < oracles.TOLERANCE
    assert oracles.relative_error(log_variance, oracles.nhwc(posterior.logvar)) < oracles.TOLERANCE

    decoded = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))(params, latents)
    assert decoded.shape == (2, 16, 24, 3)
    theirs = oracles.nhwc(model.decode(oracles.nchw(latents)).sample)
    assert oracles.relative_error(decoded, theirs) < oracles.TOLERANCE
