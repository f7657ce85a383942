import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import dino
from focusdpo_jax.models.dino import DINO, DINOConfig
from tests.models.weights import random_params

TINY = DINOConfig(
    image_size=8,
    patch_size=2,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    intermediate_size=12,
    layer_scale=True,
)
# DINOv2 ViT-S/14.
DINOV2_SMALL = DINOConfig(image_size=518, patch_size=14, epsilon=1e-6, layer_scale=True)


def count(config):
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    shapes = jax.eval_shape(DINO(config).init, jax.random.key(0), images)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_the_published_networks():
    assert count(DINOConfig()) == 21_665_664
    assert count(DINOV2_SMALL) == 22_056_192


def test_tokens_follow_the_patches():
    image = jnp.zeros((1, 5, 8, 3))
    embeddings = dino.Embeddings(TINY)
    params = {"params": random_params(embeddings, image)}
    before = embeddings.apply(params, image)
    assert before.shape == (1, 1 + 2 * 4, 8)
    changed = embeddings.apply(params, image.at[0, 2, 5].set(1.0)) - before
    # Row 1, column 2 of the 2 x 4 patches, after the class token; the fifth row of pixels is
    # outside all of them.
    np.testing.assert_array_equal(np.flatnonzero(np.abs(changed[0]).sum(-1)), [1 + 4 + 2])
    np.testing.assert_array_equal(embeddings.apply(params, image.at[0, 4].set(1.0)), before)
    # The class token keeps its position embedding for every grid.
    first = params["params"]["cls_token"] + params["params"]["position_embeddings"][:, :1]
    np.testing.assert_array_equal(before[:, :1], first)


def test_output_and_captures():
    image = jnp.ones((2, 6, 8, 3))
    model = DINO(TINY)
    params = {"params": random_params(model, image)}
    out = model.apply(params, image, capture=(2, 0))
    assert sorted(out.captured) == [0, 2]
    embedded = dino.Embeddings(TINY).apply({"params": params["params"]["embeddings"]}, image)
    np.testing.assert_array_equal(out.captured[0], embedded)
    last = np.asarray(out.captured[2], np.float64)
    last = (last - last.mean(-1, keepdims=True)) / last.std(-1, keepdims=True)
    norm = params["params"]["layernorm"]
    np.testing.assert_allclose(out.last, last * norm["scale"] + norm["bias"], atol=1e-5)
    np.testing.assert_array_equal(out.pooled, out.last[:, 0])
    with pytest.raises(ValueError, match=r"cannot capture \[3\]; known: 0 to 2"):
        model.apply(params, image, capture=(3,))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="hidden_size = 384: .* num_heads = 5"):
        DINOConfig(num_heads=5)
    with pytest.raises(UserError, match="image_size = 8: .* patch_size = 16"):
        DINOConfig(image_size=8)
