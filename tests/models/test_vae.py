import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.models.vae import VAE, VAEConfig


def test_shapes_and_bounds():
    config = VAEConfig(
        block_out_channels=(4, 8, 8), layers_per_block=1, norm_groups=4, latent_channels=3
    )
    images = jnp.zeros((1, 8, 12, 3))
    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["quant_conv"]["bias"] = jnp.array([1.0, 2.0, 3.0, -99.0, 0.5, 99.0])
    mean, log_variance = VAE(config).apply({"params": params}, images, method="encode")
    assert config.factor == 4 and mean.shape == (1, 2, 3, 3)
    np.testing.assert_array_equal(mean[0, 0, 0], [1, 2, 3])
    np.testing.assert_array_equal(log_variance[0, 0, 0], [-30, 0.5, 20])


def test_the_defaults_are_sdxl():
    shapes = jax.eval_shape(VAE(VAEConfig()).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"block_out_channels = \(8, 12\): 12 must be a multiple"):
        VAEConfig(block_out_channels=(8, 12), norm_groups=8)
