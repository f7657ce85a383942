"""Whole images: our sampler against StableDiffusionXLPipeline with an IP-Adapter."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
diffusers = pytest.importorskip("diffusers", reason="parity is checked against diffusers")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from focusdpo_jax.checkpoints import diffusers_folder  # noqa: E402
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.models.generator import PARTS, Generator  # noqa: E402
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig  # noqa: E402
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary  # noqa: E402
from tests.models.weights import random_tree  # noqa: E402
from tests.parity import oracles, pipeline, test_samplers  # noqa: E402
from tests.parity.test_diffusers_folder import examples  # noqa: E402

# Sizes that diffusers' loader takes for granted; `dropped` is that of published files.
ADAPTERS = {
    "plus": SubjectAdapterConfig(
        input_dim=14,
        output_dim=24,
        num_tokens=3,
        width=18,
        depth=4,
        num_heads=2,
        head_dim=64,
        dropped="blank",
    ),
    "plain": SubjectAdapterConfig(
        kind="projection", input_dim=12, output_dim=24, num_tokens=4, dropped="blank"
    ),
}
HEIGHT, WIDTH, STEPS, GUIDANCE, PROMPT = 24, 40, 4, 7.5, "a red boat"
NOISE = np.random.default_rng(0).normal(size=(1, HEIGHT // 2, WIDTH // 2, 4)).astype(np.float32)
# A dark one and a bright one.
REFERENCES = np.random.default_rng(1).integers(
    [[[[0]]], [[[128]]]], [[[[64]]], [[[256]]]], (2, 20, 20, 3), np.uint8
)


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """(generator, its parameters, tokenizer) of a folder, and diffusers' pipeline of the same."""
    folder = tmp_path_factory.mktemp(request.param)
    words = write_vocabulary(folder / "words", pipeline.WORDS)
    models = pipeline.parts(vocabulary=words)
    pipeline.save(folder, models)
    config = dataclasses.replace(
        diffusers_folder.load_config(folder), adapter=ADAPTERS[request.param]
    )
    shapes = examples(config)
    diffusers_folder.save_adapter(
        folder, {part: random_tree(shapes[part]) for part in ("unet", "adapter")}, config
    )
    assert diffusers_folder.load_config(folder) == config
    parameters = {part: diffusers_folder.load_part(folder, part, shapes[part]) for part in PARTS}
    ours = Generator(config), parameters, Tokenizer(folder / "tokenizer", 16)

    tokenizers = [
        transformers.CLIPTokenizer(
            vocab=str(folder / "tokenizer" / "vocab.json"),
            pad_token=padding,
            model_max_length=16,
            merges=str(folder / "tokenizer" / "merges.txt"),
        )
        for padding in ("<|endoftext|>", "!")
    ]
    theirs = diffusers.StableDiffusionXLPipeline(
        **models,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=test_samplers.scheduler("ddim"),
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}
        ),
    )
    theirs.load_ip_adapter(
        folder, subfolder="", weight_name=diffusers_folder.ADAPTER, image_encoder_folder=None
    )
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def draw(ours, sampler, guidance=GUIDANCE, steps=STEPS):
    """Generates two images from one noise, with one reference and with two; uint8 [2, H, W, 3]."""
    generator, parameters, tokenizer = ours
    view = jax.jit(generator.encode_reference)(parameters, np.float32([REFERENCES] * 2) / 255)
    generate = make_generate(
        generator, steps=steps, guidance=guidance, sampler=sampler, negative_token_ids=tokenizer("")
    )
    return generate(
        parameters,
        np.stack([tokenizer(PROMPT)] * 2),
        np.float32([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2),
        view,
        np.array([[True, False], [True, True]]),
        np.concatenate([NOISE] * 2),
    )


def draw_theirs(theirs, sampler, references, guidance=GUIDANCE, steps=STEPS, **settings):
    """The same of a pipeline, float32 [H, W, 3] in [0, 1]."""
    # Of SDXL's scheduler_config.json; Euler and DPM-Solver have another default.
    theirs.scheduler = test_samplers.scheduler(
        sampler, **{"timestep_spacing": "leading"} | settings
    )
    images = [Image.fromarray(image) for image in references]
    return theirs(
        PROMPT,
        ip_adapter_image=[images],
        latents=oracles.nchw(NOISE),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("both", ["plus"], indirect=True)
@pytest.mark.parametrize(
    "sampler, spacing, steps",
    [
        ("ddim", "trailing", 1),
        ("euler", "trailing", 4),
        ("ddim", "linspace", 30),
        ("euler", "linspace", 30),
        ("dpmpp_2m", "trailing", 4),
    ],
)
def test_images_with_the_spacing_of_the_file(both, sampler, spacing, steps):
    """Few steps (trailing, as in SDXL-Turbo's file), and Euler's timesteps with fractions."""
    (generator, *rest), theirs = both
    config = dataclasses.replace(generator.config, timestep_spacing=spacing)
    found = np.asarray(draw((Generator(config), *rest), sampler, 0.0, steps), np.float32)
    with torch.no_grad():
        expected = 255 * draw_theirs(
            theirs, sampler, REFERENCES[:1], 0.0, steps, timestep_spacing=spacing
        )
    assert np.abs(found[0] - np.round(expected)).max() <= 1
    if steps < 30:  # Other timesteps, another picture.
        other = np.asarray(draw(both[0], sampler, 0.0, steps), np.float32)
        assert np.abs(found[0] - other[0]).mean() > 1


@pytest.mark.parametrize("both", ["plus"], indirect=True)
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_images_without_guidance(both, guidance):
    """At 1 and below diffusers makes one pass under prompt and references."""
    ours, theirs = both
    found = np.asarray(draw(ours, "ddim", guidance), np.float32)
    with torch.no_grad():
        expected = [
            255 * draw_theirs(theirs, "ddim", REFERENCES[:count], guidance) for count in (1, 2)
        ]
    for mine, peer in zip(found, expected, strict=True):
        assert np.abs(mine - np.round(peer)).mean() < 0.005
    np.testing.assert_array_equal(found, draw(ours, "ddim", 1.0))


@pytest.mark.parametrize(
    "both, sampler",
    [("plus", "ddim"), ("plus", "euler"), ("plus", "dpmpp_2m"), ("plain", "ddim")],
    indirect=["both"],
)
def test_images(both, sampler):
    ours, theirs = both
    found = np.asarray(draw(ours, sampler), np.float32)
    with torch.no_grad():
        expected = [255 * draw_theirs(theirs, sampler, REFERENCES[:count]) for count in (1, 2)]
    # The pictures show something, and each reference changes them.
    assert np.std(expected[0]) > 10 and np.abs(expected[0] - expected[1]).mean() > 1
    for mine, peer in zip(found, expected, strict=True):
        # Ours is rounded; a few values fall on the other side of a half.
        assert np.abs(mine - np.round(peer)).mean() < 0.005
