"""What tells the objectives apart: their weights, and what is encoded for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.data import loader
from focusdpo_jax.models.generator import split_parameters
from focusdpo_jax.training import encoding, models, objectives, tasks


@pytest.fixture
def encoded(tiny_config, tiny_folder):
    """encoded(objective): (weights [P * 4, h, w], the batch, its encoding)."""

    def make(objective):
        config = tiny_config(objective=objective, focus__background=0.25)
        model = models.load_model(config, tiny_folder)
        transform = loader.pair_transform(tokenize=model.tokenizer, num_subjects=3)
        source = tasks.open_data(config)["train"]
        (batch,) = loader.evaluation_batches(
            [source[i] for i in range(4)], batch_size=4, transform=transform)
        buckets = tasks.focus_buckets(config)
        ((structure, numbers),) = buckets.values()
        encode = encoding.encoder(model.generator, config, buckets)
        pairs = encode(model.parameters, jax.tree.map(jnp.asarray, batch))
        task = objectives.Objective(model.generator, config, buckets, model.tokenizer(""))
        trainable, frozen = split_parameters(model.parameters, "full")
        frozen = {"parameters": frozen, "reference": trainable}
        maps = task.focus_maps(structure, frozen, pairs, numbers, jax.random.key(0))
        return np.asarray(maps.weights), batch, pairs

    return make


def shares(mask, grid):
    """The share of each cell of a grid that a bool mask [B, H, W] covers."""
    batch, height, width = mask.shape
    return mask.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1]).mean((2, 4))


def test_sft_counts_every_place_the_same(encoded):
    weights, _, pairs = encoded("sft")
    np.testing.assert_array_equal(weights, 1)
    assert pairs.latents_mean.shape[1] == 1


def test_subject_sft_counts_every_subject_above_the_background(encoded):
    weights, batch, pairs = encoded("subject_sft")
    everyone = shares(batch.masks.any(1), weights.shape[1:])
    np.testing.assert_allclose(weights, 0.25 + everyone, atol=1e-6)
    assert pairs.latents_mean.shape[1] == 1


def test_prior_dpo_counts_only_where_the_pair_differs(encoded):
    weights, batch, pairs = encoded("prior_dpo")
    np.testing.assert_allclose(
        weights[:4], 0.25 + shares(batch.prior_mask, weights.shape[1:]), atol=1e-6)
    assert pairs.latents_mean.shape[1] == 2


def test_patch_dpo_learns_from_each_place_of_the_picture_that_is_good_there(encoded):
    weights, batch, pairs = encoded("patch_dpo")
    chosen, rejected = weights[:4], weights[4:]
    np.testing.assert_allclose(chosen + rejected, 1, atol=1e-6)
    assert rejected.min() >= 0 and rejected.max() <= 1 and rejected.std() > 0.01
    assert pairs.prototypes is None and pairs.area is None and pairs.detail is None
