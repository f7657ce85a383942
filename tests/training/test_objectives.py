"""What tells the objectives apart: their weights, and what is encoded for them."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from focusdpo_jax.data import loader
from focusdpo_jax.diffusion.schedule import scaled_linear_schedule
from focusdpo_jax.models.generator import split_parameters
from focusdpo_jax.training import models, objectives, tasks


@pytest.fixture
def encoded(tiny_config):
    """encoded(objective): (weights [P * 4, h, w], the batch, its encoding)."""

    def make(objective):
        config = tiny_config(objective=objective, focus__background=0.25)
        model = models.load_model(config)
        transform = loader.pair_transform(tokenize=model.tokenizer, num_subjects=3)
        source = tasks.open_data(config)["train"]
        (batch,) = loader.evaluation_batches(
            [source[i] for i in range(4)], batch_size=4, transform=transform)
        buckets = tasks.focus_buckets(config)
        ((structure, numbers),) = buckets.values()
        source, encode = tasks.make_encoder(model.generator, config, buckets)
        pairs = encode(model.parameters, jax.tree.map(jnp.asarray, batch))
        task = objectives.Objective(model.generator, config, model.tokenizer(""), source)
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
        weights[::2], 0.25 + shares(batch.prior_mask, weights.shape[1:]), atol=1e-6)
    assert pairs.latents_mean.shape[1] == 2


def test_patch_dpo_learns_from_each_place_of_the_picture_that_is_good_there(encoded):
    weights, batch, pairs = encoded("patch_dpo")
    chosen, rejected = weights[::2], weights[1::2]
    np.testing.assert_allclose(chosen + rejected, 1, atol=1e-6)
    assert rejected.min() >= 0 and rejected.max() <= 1 and rejected.std() > 0.01
    assert pairs.prototypes is None and pairs.area is None and pairs.detail is None


class Listener:
    """Stands for a generator, and keeps what it is asked about."""

    schedule = scaled_linear_schedule()

    def encode_text(self, parameters, token_ids):
        return None, None

    def subject_tokens(self, parameters, features):
        return features

    def denoise(self, parameters, latents, timesteps, conditioning, capture):
        self.latents, self.timesteps = np.asarray(latents), np.asarray(timesteps)
        return latents, {}


def listen(latents, **overrides):
    """What a generator is asked when `sft` learns from latents [B, P, h, w, C]."""
    config = tiny.tiny_config(pathlib.Path("nowhere"), objective="sft", **overrides)
    generator, batch = Listener(), len(latents)
    objective = objectives.Objective(generator, config, np.zeros((2, 4), np.int32))
    grid = jnp.ones((batch, 1, 1))
    encoded = types.SimpleNamespace(
        latents_mean=latents, latents_deviation=jnp.zeros_like(latents), prior=grid,
        token_ids=None, text=None, pooled=None, time_ids=None, present=None,
        references=jnp.zeros((batch, 1)))
    ((_, numbers),) = tasks.focus_buckets(config).values()
    with jax.disable_jit():  # It listens to values, not to their shapes.
        objective.loss({}, {"parameters": {}}, encoded, objectives.Guidance(grid, None), numbers,
                       jax.random.key(0))
    return generator


def within_chance(share, expected, count):
    """Whether an observed share of `count` draws lies within four deviations of its law."""
    return abs(share - expected) < 4 * (expected * (1 - expected) / count)**0.5


@pytest.mark.parametrize("logits, below_881", [((), 0.881), ((2.0, 0.5), 0.5)])
def test_supervised_objectives_draw_timesteps_as_configured(logits, below_881):
    drawn = listen(jnp.zeros((2000, 1, 1, 1, 1)), timestep_logits=logits).timesteps
    assert drawn.shape == (2000,) and 0 <= drawn.min() and drawn.max() < 1000
    # T sigmoid(2) = 881 halves the logit-normal law.
    assert within_chance(np.mean(drawn < 881), below_881, 2000)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_pictures_learnt_are_rejected_ones(share):
    # A latent of 1000 shows through any noise; the chosen ones are zero.
    latents = jnp.broadcast_to(jnp.array([0.0, 1000.0]).reshape(1, 2, 1, 1, 1), (2000, 2, 1, 1, 1))
    rejected = np.abs(listen(latents, rejected_share=share).latents) > 20
    assert rejected.shape == (2000, 1, 1, 1)
    assert rejected.mean() == 0 if share == 0 else within_chance(rejected.mean(), share, 2000)
