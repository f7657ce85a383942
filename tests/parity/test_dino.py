"""DINO and DINOv2 against transformers, through folders in its layout."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("transformers", reason="parity is checked against transformers")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

from focusdpo_jax.checkpoints import dino as dino_folder  # noqa: E402
from focusdpo_jax.models import dino  # noqa: E402
from focusdpo_jax.vision import preprocess
from tests.parity import oracles  # noqa: E402
from tests.shared import shared  # noqa: E402

SIZES = dict(
    image_size=20, patch_size=5, hidden_size=24, num_hidden_layers=3, num_attention_heads=3
)
ALL = (0, 1, 2, 3)


def peer(kind):
    if kind == "vit":
        return oracles.randomised(
            transformers.ViTModel,
            transformers.ViTConfig(intermediate_size=40, **SIZES),
            add_pooling_layer=False,
        )
    return oracles.randomised(
        transformers.Dinov2Model,
        transformers.Dinov2Config(mlp_ratio=2, layerscale_value=0.5, **SIZES),
    )


@pytest.fixture(scope="module", params=["vit", "dinov2"])
def networks(request, tmp_path_factory):
    """Our module and parameters, read from a folder that transformers wrote, and its model."""
    model = peer(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return *dino_folder.load(folder), model


def their_output(model, images):
    vit = isinstance(model, transformers.ViTModel)
    options = {"interpolate_pos_encoding": True} if vit else {}
    return model(oracles.nchw(images), output_hidden_states=True, **options)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# The stored grid, other pixels on it, a larger one with a remainder, a smaller one, one of as many
# patches in another shape.
@pytest.mark.parametrize("height, width", [(20, 20), (22, 23), (34, 46), (15, 11), (10, 40)])
def test_output(networks, height, width):
    ours, params, model = networks
    images = noise(2, height, width, 3)
    out = jax.jit(lambda p, x: ours.apply({"params": p}, x, capture=ALL))(params, images)
    theirs = their_output(model, images)
    assert out.last.shape == (2, 1 + (height // 5) * (width // 5), 24)
    assert oracles.relative_error(out.last, theirs.last_hidden_state) < oracles.TOLERANCE
    assert oracles.relative_error(out.pooled, theirs.last_hidden_state[:, 0]) < oracles.TOLERANCE
    if theirs.pooler_output is not None:
        assert oracles.relative_error(out.pooled, theirs.pooler_output) < oracles.TOLERANCE
    assert len(theirs.hidden_states) == len(ALL)
    for number in ALL:
        error = oracles.relative_error(out.captured[number], theirs.hidden_states[number])
        assert error < oracles.TOLERANCE, number


def test_a_layer(networks):
    ours, params, model = networks
    # So small that the norms' epsilon and the branches show beside the input.
    states = 0.01 * noise(2, 7, 24)
    out = dino.Layer(ours.config).apply({"params": params["encoder"]["layer_1"]}, states)
    theirs = (model.layers if hasattr(model, "layers") else model.encoder.layer)[1]
    expected = theirs(torch.from_numpy(states))
    assert oracles.relative_error(out, expected) < oracles.TOLERANCE


# 37 x 37 patches are DINOv2's; 32 x 32 are those of 448 pixels.
@pytest.mark.parametrize(
    "side, grid", [(37, (32, 32)), (37, (24, 41)), (14, (28, 37)), (4, (1, 9))]
)
def test_positions(side, grid):
    positions = noise(1, 1 + side * side, 6)
    ours = dino.interpolate_positions(positions, grid)
    square = oracles.nchw(positions[:, 1:].reshape(1, side, side, 6))
    theirs = oracles.nhwc(
        torch.nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    )
    np.testing.assert_array_equal(ours[:, 0], positions[:, 0])
    assert oracles.relative_error(ours[:, 1:], theirs.reshape(1, -1, 6)) < 1e-5


@pytest.fixture(scope="module")
def trained():
    """Our module and parameters from DINOv2's trained weights, and transformers' model."""
    folder = shared("dinov2-small")
    model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    return *dino_folder.load(folder), model.eval().requires_grad_(False)


@pytest.mark.parametrize("height, width", [(448, 448), (224, 308)])
def test_trained_weights_on_photographs(trained, height, width):
    ours, params, model = trained
    settings = dataclasses.replace(preprocess.DINO, resize=(height, width), crop=None)
    images = np.stack(
        [
            preprocess.preprocess(Image.open(shared(f"dreambench/{name}/00.jpg")), settings)
            for name in ("dog", "vase")
        ]
    )
    out = jax.jit(lambda p, x: ours.apply({"params": p}, x, capture=(9, 12)))(params, images)
    theirs = their_output(model, images)
    errors = {
        "last": oracles.relative_error(out.last, theirs.last_hidden_state),
        "pooled": oracles.relative_error(out.pooled, theirs.pooler_output),
    }
    for number, states in out.captured.items():
        errors[number] = oracles.relative_error(states, theirs.hidden_states[number])
    print(height, width, errors)
    assert max(errors.values()) < 1e-4
