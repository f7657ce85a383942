"""Sizes of published adapters by their names."""

import pytest

from focusdpo_jax.checkpoints.published import adapter_sizes
from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig

FOLDER = "h94/IP-Adapter/sdxl_models/"


@pytest.mark.parametrize(
    "name, kind, read, width",
    [
        (FOLDER + "ip-adapter-plus_sdxl_vit-h.safetensors", "resampler", 1280, 1280),
        (FOLDER + "ip-adapter-plus-face_sdxl_vit-h.safetensors", "resampler", 1280, 1280),
        (FOLDER + "ip-adapter_sdxl_vit-h.safetensors", "projection", 1024, 1280),
        (FOLDER + "ip-adapter_sdxl.safetensors", "projection", 1280, 1664),
    ],
)
def test_kind_and_encoder(name, kind, read, width):
    adapter, encoder = adapter_sizes(name)
    assert (adapter.kind, adapter.input_dim, encoder.hidden_size) == (kind, read, width)
    assert adapter.dropped == "blank"
    assert read == (encoder.projection_dim if kind == "projection" else encoder.hidden_size)


def test_no_name_is_a_new_resampler():
    assert adapter_sizes("") == (SubjectAdapterConfig(), CLIPVisionConfig())
