"""The facade computes the same maps as training, without importing training."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import focusdpo_jax as fd
from focusdpo_jax.focus import maps as facade

GRID, SIDE = (4, 4), 8
PER_IMAGE = ("images", "image_features", "reference_error")
STATIC = ("grid", "prototypes", "own_subject", "coverage", "detail_bins", "detail_sigma") + (
    "detail_colour",
)


def inputs(seed=0, pairs=3, images=2, subjects=2):
    """Arguments of `focus_map` for random images of SIDE pixels."""
    rng = np.random.default_rng(seed)
    uniform = lambda *shape: rng.random(shape).astype(np.float32)
    masks = np.zeros((pairs, subjects, SIDE, SIDE), bool)
    masks[:, 0, 1:5, 1:5] = masks[:, 1, 4:8, 5:8] = True
    return {
        "images": uniform(pairs, images, SIDE, SIDE, 3),
        "prior_mask": masks.any(1),
        "subject_masks": masks,
        "image_features": uniform(pairs, images, 4, 4, 6) - 0.5,
        "reference_features": uniform(pairs, subjects, 4, 4, 6) - 0.5,
        "reference_masks": uniform(pairs, subjects, SIDE, SIDE) > 0.4,
        "reference_error": uniform(pairs, images, *GRID),
    }


def jitted(own_subject=True):
    """`focus_map` with settings for `inputs`."""
    settings = {"grid": GRID, "prototypes": 3, "detail_sigma": 2.0, "own_subject": own_subject}
    return jax.jit(functools.partial(fd.focus.focus_map, **settings))


focus_map = jitted()


@pytest.mark.parametrize("more", [False, True])
def test_it_is_what_training_computes(tiny_config, more):
    """Every map of every bucket, from the tiny run's images and its image encoder's features."""
    from focusdpo_jax.data import loader
    from focusdpo_jax.models.generator import split_parameters
    from focusdpo_jax.training import assembly, generator_step, models, run_data

    config = tiny_config(
        focus__features="vit",
        focus__prototypes=2,
        focus__own_subject=True,
        focus__lambda_c=0.5,
        focus__coverage=more,
        focus__detail_colour=more,
        focus__reference_detail=more,
    )
    model = models.load_model(config)
    generator, parameters = model.generator, model.parameters
    transform = loader.pair_transform(tokenize=model.tokenizer, num_subjects=3)
    records = run_data.open_data(config)["train"]
    (batch,) = loader.evaluation_batches(
        [records[i] for i in range(4)], batch_size=4, transform=transform
    )
    named = assembly.focus_buckets(config)
    source, encoder = assembly.make_encoder(generator, config, named)
    encoded = encoder(parameters, jax.tree.map(jnp.asarray, batch))
    step = generator_step.GeneratorStep(generator, config, model.tokenizer(""), source)
    trainable, frozen = split_parameters(parameters, "full")
    frozen = {"parameters": frozen, "reference": trainable}

    @functools.partial(jax.jit, static_argnums=0)
    def trained(structure, params):
        key = jax.random.key(0)
        outputs, _ = step.reference_pass(structure, frozen, encoded, params, key)
        return outputs, step.focus_maps(structure, frozen, encoded, params, key)

    pictures = jnp.stack([batch.chosen, batch.rejected], axis=1).astype(jnp.float32) / 255
    side = generator.patch_grid
    features = generator.encode_reference(parameters, pictures).features[:, :, 1:]
    references = encoded.references.features[:, :, 1:]
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    for (structure, params), detailed in zip(named.values(), (False, False, True, True)):
        outputs, expected = trained(structure, params)
        found = jax.jit(fd.focus.focus_map, static_argnames=STATIC)(
            pictures,
            batch.prior_mask,
            grid=encoded.prior.shape[1:],
            bucket=fd.focus.Bucket(structure.weight, params),
            image_features=features.reshape(4, 2, side, side, -1),
            reference_features=references.reshape(4, 3, side, side, -1),
            reference_masks=batch.reference_masks,
            present=batch.present,
            subject_masks=batch.masks,
            reference_error=outputs.reference_error.reshape(4, 2, *encoded.prior.shape[1:]),
            prototypes=2,
            own_subject=True,
            coverage=more,
            detail_bins=config.focus.detail_bins,
            detail_sigma=config.focus.detail_sigma,
            detail_colour=more,
            reference_images=batch.references.astype(np.float32) / 255 if more else None,
        )
        assert structure.weight.spaf and structure.weight.confidence
        assert structure.weight.dpce == detailed == (found.detail is not None)
        assert 0 < np.mean(expected.match.union) < 1 and len(np.unique(expected.weights)) > 10
        np.testing.assert_array_equal(rows(found.match.union), expected.match.union)
        for name in ("weights", "similarity", "unmatched", "detail", "uncertainty"):
            map_ = getattr(found, name)
            if map_ is not None:
                np.testing.assert_allclose(
                    rows(map_), getattr(expected, name), rtol=1e-5, atol=1e-6, err_msg=name
                )
        np.testing.assert_allclose(rows(found.weights), outputs.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spaf", [True, False])
def test_traced_timesteps_give_each_pair_the_map_of_its_bucket(spaf):
    """One program for all timesteps, with the maps of the buckets' own programs."""
    buckets = fd.focus.make_buckets(lambda_c=0.3, tau=0.1, gate_width=0.2, spaf=spaf)
    arguments = inputs(pairs=8)
    # Both ends of every bucket, noisiest first.
    timesteps = jnp.array([999, 750, 749, 500, 499, 250, 249, 0])
    traced = focus_map(**arguments, timesteps=timesteps, buckets=buckets)
    for i, bucket in enumerate(buckets):
        alone = focus_map(**arguments, bucket=bucket)
        for row in (2 * i, 2 * i + 1):
            np.testing.assert_allclose(
                traced.weights[row], alone.weights[row], rtol=1e-6, atol=1e-6
            )
    assert np.abs(np.diff(traced.weights[::2], axis=0)).max() > 0.01


def test_a_bucket_is_an_argument_of_jit_and_compiles_once_for_each_structure():
    traces = []

    @jax.jit
    def weights(bucket):
        traces.append(bucket.structure)
        return focus_map(**inputs(), bucket=bucket).weights

    results = [np.asarray(weights(bucket)) for bucket in fd.focus.make_buckets()]
    assert [str(structure) for structure in traces] == ["spaf", "spaf+dpce"]
    assert np.abs(results[0] - results[3]).max() > 0.01


def test_defaults_are_those_of_the_configuration():
    from focusdpo_jax.config import FocusConfig

    settings = FocusConfig()
    for function, names in (
        (
            fd.focus.focus_map,
            ("prototypes", "own_subject", "coverage", "detail_bins", "detail_sigma")
            + ("detail_colour",),
        ),
        (
            fd.focus.make_buckets,
            ("spaf", "dpce", "detail_fraction", "rho_noisy", "rho_clean", "lambda_s", "lambda_d")
            + ("lambda_c", "tau", "gate_width", "background", "matched"),
        ),
    ):
        parameters = inspect.signature(function).parameters
        assert {n: parameters[n].default for n in names} == {n: getattr(settings, n) for n in names}
    assert len(fd.focus.make_buckets()) == settings.buckets


def test_an_image_alone_has_the_map_that_it_has_in_its_pair():
    arguments, bucket = inputs(), fd.focus.make_buckets()[-1]
    pair = focus_map(**arguments, bucket=bucket)
    alone = {name: arguments[name][:, :1] for name in PER_IMAGE}
    one = focus_map(**(arguments | alone), bucket=bucket)
    assert one.weights.shape == (3, 1, *GRID)
    np.testing.assert_allclose(one.weights, pair.weights[:, :1], rtol=1e-6)


def test_without_their_masks_subjects_share_the_area_of_the_prior():
    """28 of 64 pixels are prior, so 7 of 16 patches: with rho 0.5 round(1.75) for each of two, round(3.5) for one."""
    arguments = inputs(pairs=1) | {"subject_masks": None}
    compute = jitted(own_subject=False)
    (bucket,) = fd.focus.make_buckets(1, rho_noisy=0.5, rho_clean=0.5)
    for present, budget in (([True, True], 4), ([True, False], 4), ([False, False], 0)):
        found = compute(**arguments, bucket=bucket, present=np.array([present]))
        np.testing.assert_array_equal(found.match.budget, [[budget, budget]])


def test_what_an_empty_slot_contains_does_not_matter():
    arguments = inputs() | {"reference_images": np.random.default_rng(1).random((3, 2, 8, 8, 3))}
    arguments["reference_images"] = arguments["reference_images"].astype(np.float32)
    bucket, present = fd.focus.make_buckets()[-1], np.array([[True, False]] * 3)
    empty = {name: arguments[name].copy() for name in ("subject_masks", "reference_masks")}
    for masks in empty.values():
        masks[:, 1] = False
    found, expected = (
        focus_map(**values, bucket=bucket, present=present)
        for values in (arguments, arguments | empty)
    )
    np.testing.assert_array_equal(found.detail, expected.detail)
    np.testing.assert_array_equal(found.weights, expected.weights)


def test_no_gradient_flows_through_a_map():
    arguments = inputs()

    def total(images, features):
        changed = arguments | {"images": images, "image_features": features}
        return focus_map(**changed, bucket=fd.focus.make_buckets()[-1]).weights.sum()

    for gradient in jax.grad(total, (0, 1))(arguments["images"], arguments["image_features"]):
        assert not gradient.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bucket": None}, "focus_map takes either bucket or timesteps"),
        ({"timesteps": np.zeros(3, int)}, "focus_map takes either bucket or timesteps"),
        (
            {"image_features": None},
            "focus_map: SPAF needs image_features, reference_features and reference_masks",
        ),
        ({"subject_masks": None}, "focus_map: own_subject needs subject_masks"),
        ({"reference_error": None}, "focus_map: lambda_c > 0 needs reference_error"),
    ],
)
def test_a_missing_argument_is_named(changes, message):
    arguments = inputs() | {"bucket": fd.focus.make_buckets(lambda_c=1.0)[0]} | changes
    with pytest.raises(ValueError, match=message):
        focus_map(**arguments)


def test_a_grid_that_does_not_divide_the_images_is_named():
    from focusdpo_jax.errors import UserError

    with pytest.raises(UserError, match="grid 3 x 3 does not divide a map of 8 x 8"):
        facade.focus_map(**inputs(), grid=(3, 3), bucket=fd.focus.make_buckets()[0])
