import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import clip
from focusdpo_jax.models.clip import (
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from tests.models.weights import random_params

SIZES = dict(hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12)
# SDXL's second text encoder, OpenCLIP ViT-bigG/14.
BIG_G = CLIPTextConfig(
    hidden_size=1280,
    num_layers=32,
    num_heads=20,
    intermediate_size=5120,
    activation="gelu",
    projection_dim=1280,
)


def count(model, inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_text_is_causal_and_pools_the_end():
    config = CLIPTextConfig(vocab_size=20, max_length=6, eos_token_id=9, projection_dim=4, **SIZES)
    ids = jnp.array([[1, 15, 9, 9, 9], [1, 15, 7, 9, 3]])
    model = CLIPText(config)
    params = random_params(model, ids)
    out = model.apply({"params": params}, ids)
    assert out.projected.shape == (2, 4)
    np.testing.assert_allclose(out.last[0, :2], out.last[1, :2], atol=1e-6)
    assert np.all(np.abs(out.last[0, 2] - out.last[1, 2]) > 1e-6)
    np.testing.assert_array_equal(out.pooled, np.stack([out.last[0, 2], out.last[1, 3]]))
    # With the legacy id the end is the highest id of the prompt.
    model = CLIPText(CLIPTextConfig(vocab_size=20, max_length=6, **SIZES))
    out = model.apply(
        {"params": {"text_model": params["text_model"]}},
        jnp.array([[1, 19, 4, 2, 2], [1, 2, 2, 2, 19]]),
    )
    np.testing.assert_array_equal(out.pooled, np.stack([out.last[0, 1], out.last[1, 4]]))
    assert out.projected is None


def test_vision_tokens_follow_the_patches():
    model = CLIPVision(CLIPVisionConfig(image_size=6, patch_size=2, projection_dim=None, **SIZES))
    image = jnp.zeros((1, 6, 6, 3))
    params = random_params(model, image)
    out = jax.eval_shape(model.apply, {"params": params}, image)
    assert out.last.shape == (1, 10, 8) and out.projected is None
    embeddings = clip.VisionEmbeddings(model.config)
    table = {"params": params["vision_model"]["embeddings"]}
    changed = embeddings.apply(table, image.at[0, 2, 5].set(1.0)) - embeddings.apply(table, image)
    # Row 1, column 2 of the 3 x 3 patches, after the class token.
    np.testing.assert_array_equal(np.flatnonzero(np.abs(changed[0]).sum(-1)), [1 + 3 + 2])


def test_the_published_towers():
    ids, image = jnp.zeros((1, 77), int), jnp.zeros((1, 224, 224, 3))
    assert count(CLIPText(CLIPTextConfig()), ids) == 123_060_480
    assert count(CLIPText(BIG_G), ids) == 694_659_840
    assert count(CLIPVision(CLIPVisionConfig()), image) == 632_076_800


def test_normalise_images():
    out = clip.normalise_images(jnp.array([[0.48145466, 0.4578275, 0.40821073], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(out, [[0, 0, 0], [1.93033, 2.07488, 2.14590]], atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="activation = 'relu'"):
        CLIPTextConfig(activation="relu")
    with pytest.raises(UserError, match="hidden_size = 8: .* num_heads = 3"):
        CLIPTextConfig(**dict(SIZES, num_heads=3))
    with pytest.raises(UserError, match="image_size = 7: .* patch_size = 2"):
        CLIPVisionConfig(image_size=7, patch_size=2, **SIZES)
