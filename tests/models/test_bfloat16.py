"""Computation in bfloat16: results that stay float32 and finite, and values that may be rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from focusdpo_jax.models import layers
from focusdpo_jax.models.attention import attend
from focusdpo_jax.models.generator import Generator, GeneratorConfig
from focusdpo_jax.models.vae import VAE, VAEConfig
from focusdpo_jax.training import assembly, models
from tests.models.weights import random_params, random_tree


def test_softmax_is_float32():
    # Two logits that are equal in bfloat16.
    query = jnp.array([[[16.0, 1, 0, 0]]], jnp.bfloat16) * 2
    key = jnp.array([[[16.0, 0, 0, 0], [16.0, 1, 0, 0]]], jnp.bfloat16)
    value = jnp.array([[[0.0, 0, 0, 0], [1.0, 1, 1, 1]]], jnp.bfloat16)
    out = attend(query, key, value, 1)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 1 / (1 + np.exp(-1)), rtol=0.01)


def test_norms_are_float32():
    # A deviation that a mean in bfloat16 would lose.
    x = jnp.array([[100.0, 100.5, 101, 101.5] * 8], jnp.bfloat16)
    for norm in (layers.LayerNorm(dtype=jnp.bfloat16), layers.GroupNorm(1, dtype=jnp.bfloat16)):
        params = {"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
        out = np.float32(norm.apply(params, x))
        np.testing.assert_allclose(out[0, :4], np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=0.01)


@pytest.mark.parametrize("dtype, finite", [(jnp.bfloat16, True), (jnp.float16, False)])
def test_decoder_handles_activations_beyond_float16(dtype, finite):
    config = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    latents = 3e3 * np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    params = random_params(VAE(config), jnp.zeros((1, 8, 8, 3)))
    # As with SDXL's own weights: residual streams of about 1e5 between the norms.
    params["decoder"]["conv_in"]["kernel"] *= 30

    def decode(dtype):
        return np.asarray(VAE(config, dtype).apply({"params": params}, latents, method="decode"))

    expected, found = decode(jnp.float32), decode(dtype)
    assert found.dtype == np.float32 and np.all(np.isfinite(found)) == finite
    if finite:
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def generator():
    return Generator(GeneratorConfig.from_dict(tiny.SIZES), jnp.bfloat16)


def shapes_of(generator, part):
    return jax.eval_shape(lambda key: generator.init_part(part, key), jax.random.key(0))


def test_a_bfloat16_reference_predicts_the_same(generator):
    params = {part: random_tree(shapes_of(generator, part)) for part in ("unet", "adapter")}
    stored = assembly.reference_parameters(params, "bfloat16")
    size = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, stored)]
    assert size[1] < 0.6 * size[0]
    draw = np.random.default_rng(1)
    text, tokens = draw.normal(size=(1, 3, 16)), draw.normal(size=(1, 1, 2, 8))
    latents, pooled = draw.normal(size=(1, 8, 8, 4)), draw.normal(size=(1, 8))

    @jax.jit
    def predict(parameters):
        image = generator.adapter.apply({"params": parameters["adapter"]}, tokens)
        return generator.unet.apply(
            {"params": parameters["unet"]},
            latents,
            jnp.array([500.0]),
            text,
            pooled,
            jnp.ones((1, 6)),
            image,
            jnp.ones((1, 1), bool),
        )[0]

    expected = predict(params)
    np.testing.assert_array_equal(predict(stored), expected)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert np.any(predict(rounded) != expected)  # Norms' vectors, too, and it is another model.


def test_types_of_stored_parameters(tiny_folder):
    config = tiny.tiny_config(tiny_folder, dtype="bfloat16", trainable="adapter")
    model = models.load_model(config)
    block = model.parameters["unet"]["down_blocks_1"]["attentions_0"]["transformer_blocks"]
    assert block["attn2"]["to_k"]["kernel"].dtype == jnp.bfloat16
    assert block["attn2"]["to_k_ip"]["kernel"].dtype == jnp.float32
    assert block["norm1"]["scale"].dtype == jnp.float32
    assert model.parameters["adapter"]["proj_in"]["kernel"].dtype == jnp.float32
    assert model.parameters["vae"]["decoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    assert model.parameters["vae"]["encoder"]["conv_in"]["kernel"].dtype == jnp.float32
    assert model.parameters["vae"]["quant_conv"]["kernel"].dtype == jnp.float32
    assert model.generator.unet.dtype == jnp.bfloat16
    plain = models.load_model(tiny.tiny_config(tiny_folder))
    assert {x.dtype for x in jax.tree.leaves(plain.parameters)} == {np.dtype("float32")}
    assert plain.generator.unet.dtype == jnp.float32


def test_images_of_another_size_are_resized_as_pillow_does():
    from PIL import Image

    config = GeneratorConfig.from_dict(tiny.SIZES)
    generator = Generator(config)
    size, draw = config.image_encoder.image_size, np.random.default_rng(0)
    picture = np.kron(draw.integers(0, 256, (12, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    small = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
    parameters = {"image_encoder": random_tree(shapes_of(generator, "image_encoder"))}
    seen = [
        generator.encode_image(parameters, jnp.asarray(np.asarray(image)[None], jnp.float32) / 255)
        for image in (picture, small)
    ]
    assert len(picture) == 96 and size == 32
    found, expected = (np.asarray(x.penultimate) for x in seen)
    # Pillow rounds to 256 levels.
    assert 0 < np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_images_are_encoded_in_float32(tiny_folder):
    models_of = [
        models.load_model(tiny.tiny_config(tiny_folder, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    wide, narrow = (
        jax.jit(model.generator.encode_latents)(model.parameters, images) for model in models_of
    )
    for expected, got in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(got, expected)
    # Decoding is in bfloat16.
    decoded = [model.generator.decode_latents(model.parameters, wide[0]) for model in models_of]
    assert np.any(decoded[0] != decoded[1])
