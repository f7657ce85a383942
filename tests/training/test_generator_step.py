"""The objectives' weights, and what is encoded for each of them."""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from focusdpo_jax.data import loader
from focusdpo_jax.diffusion.schedule import scaled_linear_schedule
from focusdpo_jax.focus import confidence
from focusdpo_jax.models.generator import split_parameters
from focusdpo_jax.training import assembly, builders, generator_step, models, run_data, state, step


def encode_four(config):
    """The model of a configuration, SPAF's source, the buckets, four pairs and their encoding."""
    model = models.load_model(config)
    transform = loader.pair_transform(tokenize=model.tokenizer, num_subjects=3)
    records = run_data.open_data(config)["train"]
    (batch,) = loader.evaluation_batches(
        [records[i] for i in range(4)], batch_size=4, transform=transform
    )
    buckets = assembly.focus_buckets(config)
    source, encode = assembly.make_encoder(model.generator, config, buckets)
    return model, source, buckets, batch, encode(model.parameters, jax.tree.map(jnp.asarray, batch))


@pytest.fixture
def encoded(tiny_config):
    """encoded(objective): (weights [P * 4, h, w], the batch, its encoding)."""

    def make(objective):
        config = tiny_config(objective=objective, focus__background=0.25)
        model, source, buckets, batch, pairs = encode_four(config)
        ((structure, params),) = buckets.values()
        task = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
        trainable, frozen = split_parameters(model.parameters, "full")
        frozen = {"parameters": frozen, "reference": trainable}
        maps = task.focus_maps(structure, frozen, pairs, params, jax.random.key(0))
        return np.asarray(maps.weights), batch, pairs

    return make


def shares(mask, grid):
    """The share of each cell of a grid that a bool mask [B, H, W] covers."""
    batch, height, width = mask.shape
    return mask.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1]).mean((2, 4))


def test_sft_weights_every_location_equally(encoded):
    weights, _, pairs = encoded("sft")
    np.testing.assert_array_equal(weights, 1)
    assert pairs.latents_mean.shape[1] == 1


def test_subject_sft_weights_subjects_above_the_background(encoded):
    weights, batch, pairs = encoded("subject_sft")
    everyone = shares(batch.masks.any(1), weights.shape[1:])
    np.testing.assert_allclose(weights, 0.25 + everyone, atol=1e-6)
    assert pairs.latents_mean.shape[1] == 1


def test_prior_dpo_weights_the_prior_above_the_background(encoded):
    weights, batch, pairs = encoded("prior_dpo")
    np.testing.assert_allclose(
        weights[::2], 0.25 + shares(batch.prior_mask, weights.shape[1:]), atol=1e-6
    )
    assert pairs.latents_mean.shape[1] == 2


def test_patch_dpo_weights_of_a_pair_sum_to_one_at_each_location(encoded):
    weights, batch, pairs = encoded("patch_dpo")
    chosen, rejected = weights[::2], weights[1::2]
    np.testing.assert_allclose(chosen + rejected, 1, atol=1e-6)
    assert rejected.min() >= 0 and rejected.max() <= 1 and rejected.std() > 0.01
    assert pairs.prototypes is None and pairs.area is None and pairs.detail is None


@pytest.mark.parametrize("own", [False, True])
def test_own_subject_drops_matches_on_other_subjects(tiny_config, own):
    config = tiny_config(focus__own_subject=own, focus__buckets=1)
    model, source, buckets, batch, pairs = encode_four(config)
    ((structure, params),) = buckets.values()
    task = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
    trainable, frozen = split_parameters(model.parameters, "full")
    maps = task.focus_maps(
        structure, {"parameters": frozen, "reference": trainable}, pairs, params, jax.random.key(0)
    )
    side = maps.weights.shape[1]
    cells = batch.masks.reshape(4, 3, side, batch.masks.shape[2] // side, side, -1).any((3, 5))
    outside = np.asarray(maps.match.subjects) * ~np.repeat(cells, 2, axis=0)
    assert (outside.sum() == 0) == own
    np.testing.assert_array_equal(maps.match.union, np.max(maps.match.subjects, axis=1))
    inside = np.asarray(maps.match.subjects) * np.repeat(cells, 2, axis=0)
    assert inside.sum() > 0


def test_confidence_weighs_by_the_reference_models_error(tiny_config):
    def maps(**fields):
        config = tiny_config(focus__buckets=1, **fields)
        model, source, buckets, _, pairs = encode_four(config)
        ((structure, params),) = buckets.values()
        task = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
        trainable, frozen = split_parameters(model.parameters, "full")
        fixed = {"parameters": frozen, "reference": trainable}
        key = jax.random.key(0)
        outputs, _ = task.reference_pass(structure, fixed, pairs, params, key)
        return task.focus_maps(structure, fixed, pairs, params, key), outputs, pairs

    plain, _, _ = maps()
    weighed, outputs, pairs = maps(focus__lambda_c=3.0)
    assert plain.uncertainty is None
    prior = np.repeat(pairs.prior, 2, axis=0)
    np.testing.assert_allclose(
        weighed.uncertainty, confidence.uncertainty(outputs.reference_error, prior), rtol=1e-5
    )
    np.testing.assert_allclose(
        weighed.weights - plain.weights, 3 * prior * weighed.uncertainty, atol=1e-5
    )


@pytest.mark.parametrize("features", ["attention", "vit"])
def test_maps_of_the_policy(tiny_config, features):
    """They equal those of the reference model if both are the same, and differ otherwise."""

    def maps(observed, scale):
        config = tiny_config(
            focus__buckets=1,
            focus__features=features,
            focus__lambda_c=2.0,
            focus__observed=observed,
        )
        model, source, buckets, _, pairs = encode_four(config)
        ((structure, params),) = buckets.values()
        task = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
        assert task.reads_policy == (observed == "policy")
        trainable, frozen = split_parameters(model.parameters, "full")
        fixed = {
            "parameters": frozen,
            "reference": trainable,
            "policy": jax.tree.map(lambda x: scale * x, trainable),
        }
        key = jax.random.key(0)
        outputs, _ = task.reference_pass(structure, fixed, pairs, params, key)
        return task.focus_maps(structure, fixed, pairs, params, key), outputs.reference_error

    (expected, error), (same, _), (other, other_error) = (
        maps("reference", 1.05),
        maps("policy", 1.0),
        maps("policy", 1.05),
    )
    np.testing.assert_allclose(same.weights, expected.weights, atol=1e-5)
    np.testing.assert_allclose(other_error, error, rtol=1e-6)  # Of the reference model in any case.
    assert np.abs(np.asarray(other.uncertainty) - expected.uncertainty).max() > 1e-3
    differs = np.abs(np.asarray(other.similarity) - expected.similarity).max() > 1e-6
    assert differs == (features == "attention")


def test_a_fading_anchor_has_the_slope_of_the_preference(tiny_config):
    """Of one pair, with a policy that is not the reference model."""

    def loss(**fields):
        config = tiny_config(objective="dpo", beta=3000.0, **fields)
        model, source, buckets, _, pairs = encode_four(config)
        ((structure, params),) = buckets.values()
        task = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
        trainable, frozen = split_parameters(model.parameters, "full")
        fixed = {"parameters": frozen, "reference": trainable}
        policy = jax.tree.map(lambda x: 1.02 * x, trainable)
        pair, key = jax.tree.map(lambda x: x[:1], pairs), jax.random.key(0)
        outputs, _ = task.reference_pass(structure, fixed, pair, params, key)
        return task.loss(policy, fixed, pair, outputs, params, key)

    without, diagnostics = loss(anchor=0.0)
    slope = 2 / (1 + np.exp(-1500.0 * float(diagnostics["margin"])))
    assert abs(slope - 1) > 0.1
    constant, fading = (
        loss(anchor=2.0, anchor_fades=fades)[0] - without for fades in (False, True)
    )
    np.testing.assert_allclose(fading, slope * constant, rtol=1e-3)


def test_preserving_the_winner_scales_the_losers_gradient_alone(tiny_config):
    """The loss is the same, and the gradient another."""

    def made(**fields):
        config = tiny_config(objective="dpo", beta=30.0, anchor=0.0, **fields)
        model, source, buckets, _, pairs = encode_four(config)
        ((structure, params),) = buckets.values()
        task = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
        trainable, frozen = split_parameters(model.parameters, "adapter")
        fixed = {"parameters": frozen, "reference": trainable}
        key = jax.random.key(0)
        outputs, _ = task.reference_pass(structure, fixed, pairs, params, key)

        def loss(policy):
            return task.loss(policy, fixed, pairs, outputs, params, key)

        (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        return value, found, ravel_pytree(gradient)[0]

    value, _, plain = made()
    scaled_value, found, scaled = made(preserve_winner=True)
    assert scaled_value == pytest.approx(float(value), rel=1e-6)
    scale = float(found["loser_scale"])
    assert 0 < scale < 1
    assert jnp.linalg.norm(scaled - plain) > 1e-3 * jnp.linalg.norm(plain)


class RecordingGenerator:
    """Replaces a generator, and records the latents and timesteps given to `denoise`."""

    schedule = scaled_linear_schedule()

    def encode_text(self, parameters, token_ids):
        return None, None

    def subject_tokens(self, parameters, features):
        return features

    def denoise(self, parameters, latents, timesteps, conditioning, capture):
        self.latents, self.timesteps = np.asarray(latents), np.asarray(timesteps)
        return latents, {}


def recorded_inputs(latents, **overrides):
    """Returns the generator with the recorded inputs of an `sft` loss of latents [B, P, h, w, C]."""
    config = tiny.tiny_config(pathlib.Path("nowhere"), objective="sft", **overrides)
    generator, batch = RecordingGenerator(), len(latents)
    objective = generator_step.GeneratorStep(generator, config, np.zeros((2, 4), np.int32))
    grid = jnp.ones((batch, 1, 1))
    encoded = types.SimpleNamespace(
        latents_mean=latents,
        latents_deviation=jnp.zeros_like(latents),
        prior=grid,
        token_ids=None,
        text=None,
        pooled=None,
        time_ids=None,
        present=None,
        references=jnp.zeros((batch, 1)),
    )
    ((_, params),) = assembly.focus_buckets(config).values()
    with jax.disable_jit():  # Values are recorded, not tracers.
        objective.loss(
            {},
            {"parameters": {}},
            encoded,
            generator_step.ReferenceOutputs(grid, None),
            params,
            jax.random.key(0),
        )
    return generator


def within_chance(share, expected, count):
    """Whether an observed share of `count` samples is within four standard deviations of its mean."""
    return abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize("logits, below_881", [((), 0.881), ((2.0, 0.5), 0.5)])
def test_supervised_objectives_draw_timesteps_as_configured(logits, below_881):
    drawn = recorded_inputs(jnp.zeros((2000, 1, 1, 1, 1)), timestep_logits=logits).timesteps
    assert drawn.shape == (2000,) and 0 <= drawn.min() and drawn.max() < 1000
    # T sigmoid(2) = 881 halves the logit-normal law.
    assert within_chance(np.mean(drawn < 881), below_881, 2000)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_training_images_is_rejected_ones(share):
    # A latent of 1000 shows through any noise; the chosen ones are zero.
    latents = jnp.broadcast_to(jnp.array([0.0, 1000.0]).reshape(1, 2, 1, 1, 1), (2000, 2, 1, 1, 1))
    rejected = np.abs(recorded_inputs(latents, rejected_share=share).latents) > 20
    assert rejected.shape == (2000, 1, 1, 1)
    assert rejected.mean() == 0 if share == 0 else within_chance(rejected.mean(), share, 2000)


@pytest.fixture(scope="module")
def preference(tiny_folder):
    """preference(chances, **overrides): a step that drops conditions, its pairs and its model."""

    @functools.cache
    def opened(**overrides):
        config = tiny.tiny_config(tiny_folder, **overrides)
        model, source, buckets, _, pairs = encode_four(config)
        return config, model, source, buckets, pairs

    def make(chances, **overrides):
        config, model, source, buckets, pairs = opened(**overrides)
        config = tiny.changed(config, condition_dropout=chances)
        objective = generator_step.GeneratorStep(
            model.generator, config, model.tokenizer(""), source
        )
        trainable, frozen = split_parameters(model.parameters, "full")
        # Another reference model than the policy, so that the margin is not zero.
        reference = jax.tree.map(lambda x: 1.3 * x, trainable)
        frozen = {"parameters": frozen, "reference": reference}
        if objective.drops:
            frozen["unconditional"] = objective.unconditional(model.parameters)
        structure, params = next(iter(buckets.values()))

        def step(pairs, key=jax.random.key(3)):
            outputs, _ = objective.reference_pass(structure, frozen, pairs, params, key)
            loss, found = objective.loss(trainable, frozen, pairs, outputs, params, key)
            return outputs, loss, found["margin"]

        return step, pairs, model

    return make


def without(pairs, model, caption, references):
    """Returns pairs with the empty caption if `caption`, without references if `references`."""
    if caption:
        text, pooled = model.generator.encode_negative(
            model.parameters, jnp.asarray(model.tokenizer(""))[None]
        )
        pairs = pairs.replace(
            text=jnp.broadcast_to(text, pairs.text.shape),
            pooled=jnp.broadcast_to(pooled, pairs.pooled.shape),
        )
    return pairs.replace(present=jnp.zeros_like(pairs.present)) if references else pairs


@pytest.mark.parametrize(
    "chances, caption, references",
    [((1.0, 0.0, 0.0), True, False), ((0.0, 1.0, 0.0), False, True), ((0.0, 0.0, 1.0), True, True)],
)
def test_conditions_are_dropped_for_both_images_of_a_pair(preference, chances, caption, references):
    step, pairs, model = preference(chances, objective="dpo")
    plain, _, _ = preference((0.0, 0.0, 0.0), objective="dpo")
    outputs, loss, margin = step(pairs)
    expected_outputs, expected, expected_margin = plain(without(pairs, model, caption, references))
    np.testing.assert_allclose(outputs.reference_error, expected_outputs.reference_error, rtol=1e-5)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert margin == pytest.approx(float(expected_margin), rel=1e-4) and abs(margin) > 1e-6
    whole, _, _ = plain(pairs)
    assert np.abs(outputs.reference_error - whole.reference_error).max() > 1e-4


def test_weights_of_the_attention_source_match_nothing_without_references(preference):
    fields = {"focus__features": "attention", "focus__dpce": False}
    dropped, pairs, _ = preference((0.0, 1.0, 0.0), **fields)
    kept, _, _ = preference((0.0, 0.0, 0.0), **fields)
    # background + prior (1 + lambda_s)
    np.testing.assert_allclose(
        dropped(pairs)[0].weights, 0.5 + 2 * np.repeat(pairs.prior, 2, axis=0), rtol=1e-6
    )
    assert np.abs(kept(pairs)[0].weights - dropped(pairs)[0].weights).max() > 0.5


def test_conditions_are_dropped_at_the_configured_rate():
    no_caption, no_references = map(
        np.asarray, generator_step.drawn_dropout(jax.random.key(1), 4000, (0.1, 0.2, 0.3))
    )
    for drawn, expected in (
        (no_caption & ~no_references, 0.1),
        (no_references & ~no_caption, 0.2),
        (no_caption & no_references, 0.3),
    ):
        assert within_chance(drawn.mean(), expected, 4000)


def test_bfloat16_margins_are_zero_at_equal_parameters(tiny_config, tmp_path):
    """Of the shipped generator, with remat as SDXL is trained: two programs, one rounding."""
    config = tiny_config(
        objective="dpo",
        dtype="bfloat16",
        model__remat=True,
        beta=5000.0,
        model__pretrained=tiny.load_config("toybox_dpo").model.pretrained,
    )
    task = builders.make_task(config, tmp_path)
    optimizer = state.make_optimizer(config)
    start = state.create_state(task.trainable, optimizer, 0)
    compiled = step.compile_step(task.definition, optimizer, start, task.example(), seed=0)
    ((structure, params),) = task.definition.buckets.values()
    batch = task.prepare(next(iter(task.batches)))
    _, metrics = compiled(structure, start, task.definition.frozen, batch, params, 0)
    metrics = metrics.compute()
    assert metrics["reference_error"] > 0.1
    assert metrics["logit_scale"] < 1e-3
