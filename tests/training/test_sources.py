"""SPAF's three sources in the same step: their common properties, and their cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from focusdpo_jax import config as config_lib
from focusdpo_jax import objectives
from focusdpo_jax.data import loader
from focusdpo_jax.errors import UserError
from focusdpo_jax.focus import correspondence
from focusdpo_jax.focus.buckets import BucketStructure
from focusdpo_jax.models.generator import Conditioning, split_parameters
from focusdpo_jax.training import assembly, generator_step, models, run_data, sources

SOURCES = ("vit", "unet", "attention")
SLOTS = ("references", "reference_masks", "masks", "present")


class Case:
    """Four pairs of the tiny data set, and everything that weighs them."""

    def __init__(self, config, folder):
        self.config, self.model = config, models.load_model(config)
        transform = loader.pair_transform(tokenize=self.model.tokenizer, num_subjects=3)
        records = run_data.open_data(config)["train"]
        (self.batch,) = loader.evaluation_batches(
            [records[i] for i in range(4)], batch_size=4, transform=transform
        )
        self.buckets = assembly.focus_buckets(config)
        source, self.encoder = assembly.make_encoder(self.model.generator, config, self.buckets)
        self.objective = generator_step.GeneratorStep(
            self.model.generator, config, self.model.tokenizer(""), source
        )
        trainable, frozen = split_parameters(self.model.parameters, "full")
        self.frozen = {"parameters": frozen, "reference": trainable}
        self.maps = jax.jit(self.objective.focus_maps, static_argnums=0)

    def encode(self, **changes):
        return self.encoder(
            self.model.parameters, jax.tree.map(jnp.asarray, self.batch.replace(**changes))
        )

    def weigh(self, encoded, bucket=-1):
        structure, params = list(self.buckets.values())[bucket]
        return jax.device_get(self.maps(structure, self.frozen, encoded, params, jax.random.key(0)))


@pytest.fixture(scope="module")
def cases(tiny_folder):
    """cases(source): its Case, by default with two prototypes per subject."""
    import tiny

    return functools.cache(
        lambda source, count=2: Case(
            tiny.tiny_config(tiny_folder, focus__features=source, focus__prototypes=count),
            tiny_folder,
        )
    )


@pytest.mark.parametrize("source", SOURCES)
def test_order_and_empty_slots_of_subjects_do_not_matter(source, cases):
    case = cases(source)
    maps = case.weigh(case.encode())
    assert 0 < maps.match.union.mean() < 1 and len(np.unique(maps.weights)) > 10
    # With three in a scene the slots are full; with one, two hold nothing.
    present = case.batch.present
    assert present.any() and not present.all()

    junk = np.random.default_rng(0)
    filled = {name: getattr(case.batch, name).copy() for name in SLOTS[:3]}
    for value in filled.values():
        value[~present] = junk.integers(0, 2, value[~present].shape) * (
            255 if value.dtype == np.uint8 else 1
        )
    again = case.weigh(case.encode(**filled))
    np.testing.assert_array_equal(again.match.union, maps.match.union)
    np.testing.assert_allclose(again.weights, maps.weights, rtol=1e-5)

    order = np.array([2, 0, 1])
    moved = case.weigh(case.encode(**{n: getattr(case.batch, n)[:, order] for n in SLOTS}))
    np.testing.assert_allclose(
        (moved.similarity - maps.similarity[:, order])[np.repeat(present[:, order], 2, axis=0)],
        0,
        atol=1e-4,
    )
    np.testing.assert_array_equal(moved.match.union, maps.match.union)
    np.testing.assert_allclose(moved.weights, maps.weights, rtol=1e-5)


def test_features_of_the_unet_change_with_the_noise_and_those_of_the_encoder_do_not(cases):
    unet, vit = (cases(source) for source in ("unet", "vit"))
    encoded = unet.encode()
    assert encoded.prototypes.shape == (4, 4, 3, 2, 2, 8) and encoded.similarity is None
    first, last = (unet.weigh(encoded, bucket).similarity for bucket in (0, -1))
    assert np.abs(first - last).max() > 1e-3
    encoded = vit.encode()
    side = vit.model.generator.patch_grid
    assert encoded.prototypes is None and encoded.similarity.shape == (4, 2, 4, side, side)
    first, last = (vit.weigh(encoded, bucket).similarity for bucket in (0, -1))
    np.testing.assert_array_equal(first, last)


def test_the_encoders_similarity_is_kept_per_image_in_full_precision(cases):
    case = cases("vit")
    generator, parameters = case.model.generator, case.model.parameters
    kept = case.encode()
    assert kept.similarity.dtype == np.float32
    side = generator.patch_grid
    for picture, images in enumerate((case.batch.chosen, case.batch.rejected)):
        features = [
            generator.encode_reference(parameters, jnp.asarray(x, jnp.float32) / 255).features
            for x in (case.batch.references[:, 0], images)
        ]
        reference, target = (x[:, 1:] for x in features)
        described = correspondence.subject_and_background_prototypes(
            reference[:, None],
            sources.masks_on_grid(case.batch.reference_masks[:, :1], (side, side)),
            case.batch.present[:, :1],
            2,
        )
        expected, _ = correspondence.prototype_similarity(
            described, target.reshape(4, side, side, -1)
        )
        np.testing.assert_allclose(kept.similarity[:, picture, 0], expected[:, 0], atol=1e-5)


def test_a_cached_prototype_is_the_mean_feature_of_its_denoised_reference(cases):
    case = cases("unet", 1)
    generator, parameters = case.model.generator, case.model.parameters
    encoded = case.encode()
    pixels = jnp.asarray(case.batch.references[:1, 0], jnp.float32) / 255
    mean, _ = generator.encode_latents(parameters, pixels)
    text, pooled = generator.encode_text(parameters, encoded.token_ids[:1])
    alone = Conditioning(
        text=text,
        pooled=pooled,
        time_ids=encoded.time_ids[:1],
        image_tokens=generator.subject_tokens(
            parameters, jax.tree.map(lambda x: x[:1, :1], encoded.references)
        ),
        image_present=jnp.ones((1, 1), bool),
    )
    # In the cleanest bucket the noise hardly matters, so none is drawn here.
    timesteps = jnp.array([124])
    noisy = generator.schedule.add_noise(mean, jnp.zeros_like(mean), timesteps)
    _, captured = generator.denoise(parameters, noisy, timesteps, alone, capture=("up_blocks_0",))
    features = np.asarray(captured["up_blocks_0"][0])
    side = features.shape[0]
    mask = case.batch.reference_masks[0, 0].reshape(side, 32 // side, side, -1).mean((1, 3))
    prototype = (features * mask[..., None]).sum((0, 1))
    cosine = prototype / np.linalg.norm(prototype) @ np.asarray(encoded.prototypes[0, -1, 0, 0, 0])
    others = [
        prototype / np.linalg.norm(prototype) @ np.asarray(encoded.prototypes[0, k, 0, 0, 0])
        for k in range(3)
    ]
    assert cosine > 0.9 and cosine > max(others)


@pytest.mark.parametrize("spaf, dpce", [(False, False), (True, False), (False, True)])
def test_what_a_structure_switches_off_is_not_in_the_compiled_reference_pass(spaf, dpce, cases):
    case = cases("attention")
    _, params = list(case.buckets.values())[-1]
    structure = generator_step.StepStructure(
        objectives.get("focus_dpo"), BucketStructure(spaf=spaf, dpce=dpce)
    )
    compiled = (
        jax.jit(case.objective.reference_pass, static_argnums=0)
        .lower(structure, case.frozen, case.encode(), params, jax.random.key(0))
        .compile()
        .as_text()
    )
    assert ("/spaf/" in compiled) == spaf
    assert ("/slot_attention/" in compiled) == spaf
    assert ("/dpce/" in compiled) == dpce
    assert (" sort(" in compiled) == spaf


@pytest.mark.parametrize(
    "switches, structures",
    [
        ({"focus__dpce": False}, ["spaf"] * 4),
        ({"focus__spaf": False}, ["prior"] * 2 + ["dpce"] * 2),
        ({}, ["spaf"] * 2 + ["spaf+dpce"] * 2),
    ],
)
def test_each_half_of_focus_works_alone(switches, structures, tiny_config):
    buckets = assembly.focus_buckets(tiny_config(**switches))
    assert [str(structure.weight) for structure, _ in buckets.values()] == structures
    assert [int(params.index) for _, params in buckets.values()] == [0, 1, 2, 3]


def test_references_are_denoised_once_or_not_at_all(tiny_config):
    config = tiny_config(focus__features="unet", data__cache=False)
    with pytest.raises(UserError, match="config.data.cache = False: config.focus.features"):
        config_lib.check(config)
    config = tiny.changed(config, focus__spaf=False)
    config_lib.check(config)
