"""Inpainted images against StableDiffusionXLInpaintPipeline, with UNets of 4 and 9 channels."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
diffusers = pytest.importorskip("diffusers", reason="parity is checked against diffusers")

import torch  # noqa: E402
import transformers  # noqa: E402
from diffusers.pipelines.stable_diffusion_xl import (  # noqa: E402
    pipeline_stable_diffusion_xl_inpaint as peer_module,
)
from PIL import Image  # noqa: E402

from focusdpo_jax.checkpoints import diffusers_folder  # noqa: E402
from focusdpo_jax.disruption.inpainting import make_inpaint  # noqa: E402
from focusdpo_jax.models.generator import PARTS, Generator  # noqa: E402
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary  # noqa: E402
from tests.models.weights import random_tree  # noqa: E402
from tests.parity import oracles, pipeline, test_samplers, test_unet  # noqa: E402
from tests.parity.test_diffusers_folder import examples  # noqa: E402

HEIGHT, WIDTH, STEPS, GUIDANCE, PROMPT = 24, 40, 5, 3.0, "a red boat"
DRAW = np.random.default_rng(0)
NOISE = DRAW.normal(size=(1, HEIGHT // 2, WIDTH // 2, 4)).astype(np.float32)
# Smooth, so that the VAE of random weights tells places apart.
PICTURE = np.asarray(
    Image.fromarray(DRAW.integers(0, 256, (4, 5, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
)
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[6:20, 10:28] = True  # Whole latents: theirs takes the nearest pixel where a cell is divided.


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """(generator, its parameters, tokenizer) of a folder, and diffusers' pipeline of the same."""
    folder = tmp_path_factory.mktemp(f"channels{request.param}")
    models = pipeline.parts(vocabulary=write_vocabulary(folder / "words", pipeline.WORDS))
    models["unet"] = test_unet.peer(dataclasses.replace(test_unet.SMALL, in_channels=request.param))
    pipeline.save(folder, models)
    config = diffusers_folder.load_config(folder)
    shapes = examples(config)
    parameters = {part: diffusers_folder.load_part(folder, part, shapes[part]) for part in PARTS}
    parameters["adapter"] = random_tree(shapes["adapter"])  # There is none, and none is looked at.
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
    del models["image_encoder"]
    theirs = diffusers.StableDiffusionXLInpaintPipeline(
        **models,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=test_samplers.scheduler("ddim"),
    )
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def draw(ours, sampler, strength, guidance=GUIDANCE):
    """uint8 [H, W, 3]."""
    generator, parameters, tokenizer = ours
    inpaint = make_inpaint(
        generator,
        steps=STEPS,
        strength=strength,
        guidance=guidance,
        sampler=sampler,
        negative_token_ids=tokenizer(""),
    )
    return np.asarray(
        inpaint(
            parameters,
            PICTURE,
            MASK,
            tokenizer(PROMPT),
            np.float32([HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]),
            np.ones((20, 20, 3), np.float32),
            np.array(False),
            NOISE,
            jax.random.split(jax.random.key(0), 1),
        )
    )[0]


def draw_theirs(theirs, sampler, strength, monkeypatch):
    """The same of the pipeline, float32 [H, W, 3] in [0, 1], from our noise and the VAE's mean."""
    retrieve = peer_module.retrieve_latents
    monkeypatch.setattr(
        peer_module,
        "retrieve_latents",
        lambda encoded, generator=None: retrieve(encoded, generator, sample_mode="argmax"),
    )
    monkeypatch.setattr(peer_module, "randn_tensor", lambda *a, **k: oracles.nchw(NOISE))
    # Of SDXL's scheduler_config.json; Euler and DPM-Solver have another default.
    theirs.scheduler = test_samplers.scheduler(sampler, timestep_spacing="leading")
    with torch.no_grad():
        return theirs(
            PROMPT,
            image=Image.fromarray(PICTURE),
            mask_image=Image.fromarray(MASK),
            strength=strength,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="np",
        ).images[0]


@pytest.mark.parametrize("both", [4], indirect=True)
def test_guidance_of_zero_is_none(both):
    np.testing.assert_array_equal(draw(both[0], "ddim", 0.6, 0.0), draw(both[0], "ddim", 0.6, 1.0))


@pytest.mark.parametrize(
    "both, sampler, strength",
    [(4, "ddim", 0.6), (4, "dpmpp_2m", 0.8), (9, "euler", 1.0)],
    indirect=["both"],
)
def test_images(both, sampler, strength, monkeypatch):
    ours, theirs = both
    found = draw(ours, sampler, strength).astype(np.float32)
    expected = 255 * draw_theirs(theirs, sampler, strength, monkeypatch)
    assert np.std(expected) > 10  # It shows something.
    # Ours is rounded; a few values fall on the other side of a half.
    assert np.abs(found - np.round(expected)).mean() < 0.02
