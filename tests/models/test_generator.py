"""A generator with subject reference images and each kind of adapter."""

import dataclasses

import jax
import jaxtyping
import numpy as np
import pytest
import tiny

from focusdpo_jax.errors import UserError
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.models import clip
from focusdpo_jax.models.generator import PARTS, Conditioning, Generator, GeneratorConfig, ImageView
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig
from tests.models.weights import random_tree

RESAMPLER = GeneratorConfig.from_dict(tiny.SIZES)
PROJECTION = dataclasses.replace(
    RESAMPLER,
    adapter=SubjectAdapterConfig(kind="projection", input_dim=8, output_dim=16, num_tokens=4),
)
GROUNDING = dataclasses.replace(
    RESAMPLER,
    adapter=dataclasses.replace(RESAMPLER.adapter, kind="grounding", phrase_dim=8, frequencies=2),
)
PIXELS = np.random.default_rng(0).uniform(size=(2, 3, 32, 32, 3)).astype(np.float32)


def parameters(generator, parts=PARTS):
    shapes = {
        part: jax.eval_shape(
            lambda key, part=part: generator.init_part(part, key), jax.random.key(0)
        )
        for part in parts
    }
    return {part: random_tree(tree, seed) for seed, (part, tree) in enumerate(shapes.items())}


def test_each_adapter_reads_its_part_of_the_view():
    for config, tokens in ((RESAMPLER, 2), (PROJECTION, 4)):
        generator = Generator(config)
        values = parameters(generator, ("adapter", "image_encoder"))
        view = jax.jit(generator.encode_reference)(values, PIXELS)
        seen = jax.jit(generator.encode_image)(values, PIXELS[1])
        np.testing.assert_allclose(view.features[1], seen.penultimate, rtol=1e-4, atol=1e-5)
        subjects = jax.jit(generator.subject_tokens)
        found = subjects(values, view)
        assert found.shape == (2, 3, tokens, 16)
        other = view.replace(features=view.features + 1)
        if config is PROJECTION:
            np.testing.assert_allclose(view.embedding[1], seen.projected, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(subjects(values, other), found)
            other = view.replace(embedding=view.embedding[..., ::-1])
        else:
            assert view.embedding is None
        assert np.abs(subjects(values, other) - found).max() > 0.1


def test_phrases_and_boxes_ground_each_reference_independently():
    generator = Generator(GROUNDING)
    values = parameters(generator, ("adapter", "image_encoder", "text_encoder"))
    view = jax.jit(generator.encode_reference)(values, PIXELS)
    ids = np.random.default_rng(1).integers(0, 500, (2, 3, 16))
    boxes = np.float32([[[0, 0, 0.5, 1]] * 3] * 2)

    @jax.jit
    def tokens(ids, boxes):
        return generator.subject_tokens(values, generator.ground(values, view, ids, boxes))

    def changed(ids, boxes):
        return np.abs(tokens(ids, boxes) - found).max((2, 3)) > 1e-3

    found, slot = tokens(ids, boxes), np.array([[False, False, False], [False, True, False]])
    np.testing.assert_array_equal(changed(np.where(slot[:, :, None], ids + 1, ids), boxes), slot)
    np.testing.assert_array_equal(changed(ids, boxes + 0.25 * slot[:, :, None]), slot)
    assert np.abs(jax.jit(generator.subject_tokens)(values, view) - found).max() > 0.1


def test_images_with_the_plain_adapter():
    generator = Generator(PROJECTION)
    values = parameters(generator)
    view = jax.eval_shape(generator.encode_reference, values, PIXELS)
    ids = np.zeros((2, 2, 16), np.int32)
    pictures = jax.eval_shape(
        make_generate(generator, steps=2, guidance=3.0, negative_token_ids=ids[0]),
        values,
        ids,
        np.zeros((2, 6)),
        view,
        np.ones((2, 3), bool),
        np.zeros((2, 8, 8, 4)),
    )
    assert pictures.shape == (2, 32, 32, 3)


def test_a_wrong_shape_fails_at_the_signature():
    """Before the UNet is called, so that no parameters are needed."""
    generator = Generator(RESAMPLER)
    conditioning = Conditioning(
        text=np.zeros((2, 16, 16), np.float32),
        pooled=np.zeros((2, 8), np.float32),
        time_ids=np.zeros((2, 6), np.float32),
        image_tokens=np.zeros((2, 3, 2, 16), np.float32),
        image_present=np.ones((2, 3), bool),
    )
    latents, timesteps = np.zeros((2, 8, 8, 4), np.float32), np.zeros(2, np.int32)
    for wrong, at, name in (
        (latents[0], timesteps, "latents"),
        (latents.astype(int), timesteps, "latents"),
        (latents, timesteps[:1], "timesteps"),
        (latents, timesteps[:, None], "timesteps"),
    ):
        with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{name}'"):
            generator.denoise({}, wrong, at, conditioning)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'token_ids'"):
        jax.eval_shape(generator.encode_text, {}, np.zeros((2, 16), np.int32))
    with pytest.raises(KeyError, match="unet"):
        generator.denoise({}, latents, timesteps, conditioning)


def test_trees_of_shapes_and_of_none_have_the_generators_types():
    view = ImageView(np.zeros((2, 3, 5, 8), np.float32))
    shapes = jax.eval_shape(lambda x: x, view)
    assert shapes.features == jax.ShapeDtypeStruct((2, 3, 5, 8), np.float32)
    assert jax.tree.map(lambda x: None, view).features is None


def test_errors_name_parts_that_do_not_fit():
    encoder = clip.CLIPVisionConfig()
    with pytest.raises(UserError, match="input_dim = 8, .*image_encoder.hidden_size = 1280"):
        dataclasses.replace(RESAMPLER, image_encoder=encoder)
    with pytest.raises(
        UserError, match="'projection' reads features of width image_encoder.projection_dim = 1024"
    ):
        dataclasses.replace(PROJECTION, image_encoder=encoder)
    with pytest.raises(UserError, match="phrase_dim = 768, .*text_encoder.hidden_size = 8"):
        dataclasses.replace(
            GROUNDING, adapter=dataclasses.replace(GROUNDING.adapter, phrase_dim=768)
        )
    with pytest.raises(UserError, match="adapter.output_dim = 2048, .*cross_attention_dim = 16"):
        dataclasses.replace(RESAMPLER, adapter=SubjectAdapterConfig(input_dim=8))
