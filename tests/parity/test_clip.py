"""CLIP's towers against transformers, through the names that saved files have."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("transformers", reason="parity is checked against transformers")

import safetensors.numpy  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from focusdpo_jax.checkpoints import pytorch_names  # noqa: E402
from focusdpo_jax.models.clip import (  # noqa: E402
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from tests.parity import oracles  # noqa: E402

SIZES = dict(hidden_size=24, num_layers=3, num_heads=3, intermediate_size=40)
# transformers' names for the same.
THEIR_SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
IDS = np.array([[40, 3, 17, 41, 41, 41, 41], [40, 9, 30, 8, 22, 5, 41]], np.int32)


def saved(model, folder):
    """What the model writes: transformers renames some parameters between file and memory."""
    model.save_pretrained(folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def published(tensors):
    """The names of the published files, which have the outermost module that version 5 drops."""
    if any(name.startswith("text_model.") for name in tensors):
        return tensors
    return {f"text_model.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "activation, projection_dim, eos", [("quick_gelu", None, 2), ("gelu", 12, 2), ("gelu", 12, 22)]
)
def test_text(activation, projection_dim, eos, tmp_path):
    their_config = transformers.CLIPTextConfig(
        vocab_size=42,
        max_position_embeddings=9,
        hidden_act=activation,
        eos_token_id=eos,
        bos_token_id=40,
        projection_dim=projection_dim or 12,
        **THEIR_SIZES,
    )
    kind = (
        transformers.CLIPTextModelWithProjection if projection_dim else transformers.CLIPTextModel
    )
    model = oracles.randomised(kind, their_config)
    ids = np.where(IDS == 41, 22, IDS) if eos == 22 else IDS
    ours = CLIPText(
        CLIPTextConfig(
            vocab_size=42,
            max_length=9,
            activation=activation,
            projection_dim=projection_dim,
            eos_token_id=eos,
            **SIZES,
        )
    )
    template = jax.eval_shape(ours.init, jax.random.key(0), ids)["params"]
    tensors = saved(model, tmp_path)
    params = oracles.load(template, published(tensors))
    jax.tree.map(np.testing.assert_array_equal, params, pytorch_names.to_flax(tensors, template))
    out = jax.jit(ours.apply)({"params": params}, ids)
    theirs = model(torch.from_numpy(ids.astype(np.int64)), output_hidden_states=True)
    assert oracles.relative_error(out.last, theirs.last_hidden_state) < oracles.TOLERANCE
    assert oracles.relative_error(out.penultimate, theirs.hidden_states[-2]) < oracles.TOLERANCE
    if projection_dim:
        assert oracles.relative_error(out.projected, theirs.text_embeds) < oracles.TOLERANCE
    else:
        assert out.projected is None
        assert oracles.relative_error(out.pooled, theirs.pooler_output) < oracles.TOLERANCE


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_vision(activation, tmp_path):
    model = oracles.randomised(
        transformers.CLIPVisionModelWithProjection,
        transformers.CLIPVisionConfig(
            image_size=20, patch_size=5, hidden_act=activation, projection_dim=12, **THEIR_SIZES
        ),
    )
    ours = CLIPVision(
        CLIPVisionConfig(
            image_size=20, patch_size=5, activation=activation, projection_dim=12, **SIZES
        )
    )
    images = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    template = jax.eval_shape(ours.init, jax.random.key(0), images)["params"]
    params = oracles.load(template, saved(model, tmp_path))
    out = jax.jit(ours.apply)({"params": params}, images)
    theirs = model(oracles.nchw(images), output_hidden_states=True)
    assert out.penultimate.shape == (2, 17, 24)
    assert oracles.relative_error(out.last, theirs.last_hidden_state) < oracles.TOLERANCE
    assert oracles.relative_error(out.penultimate, theirs.hidden_states[-2]) < oracles.TOLERANCE
    assert oracles.relative_error(out.projected, theirs.image_embeds) < oracles.TOLERANCE
