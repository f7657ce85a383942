import numpy as np
import pytest

from focusdpo_jax.checkpoints import ip_adapter
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig


def attention(value):
    return {
        "transformer_blocks": {
            "attn2": {
                "to_k_ip": {"kernel": np.full((1, 2, 2), value)},
                "to_q": {"kernel": np.zeros((1, 2, 2))},
                "to_v_ip": {"kernel": np.full((1, 2, 2), -value)},
            }
        }
    }


UNET = {
    "mid_block": {"attentions_0": attention(4.0)},
    "up_blocks_0": {"attentions_10": attention(3.0), "attentions_9": attention(2.0)},
    "down_blocks_2": {"attentions_0": attention(1.0)},
}
LAYER = {
    "ln0": {"scale": np.ones(2), "bias": np.zeros(2)},
    "attn": {
        name: {"kernel": np.full((2, 4), value)}
        for name, value in (("to_q", 1.0), ("to_k", 2.0), ("to_v", 3.0))
    },
    "ff_1": {"net_2": {"kernel": np.ones((4, 2))}},
}
RESAMPLER = {
    "latents": np.zeros((1, 3, 2)),
    "layers_0": LAYER,
    "proj_in": {"kernel": np.ones((5, 2))},
}


def test_names_and_order():
    tensors = ip_adapter.from_flax(UNET, RESAMPLER)
    # Encoder, decoder by number, then the middle block.
    for number, value in ((1, 1.0), (3, 2.0), (5, 3.0), (7, 4.0)):
        np.testing.assert_array_equal(tensors[f"ip_adapter.{number}.to_k_ip.weight"], value)
        np.testing.assert_array_equal(tensors[f"ip_adapter.{number}.to_v_ip.weight"], -value)
    projection = {
        name: value.shape for name, value in tensors.items() if name.startswith("image_proj.")
    }
    assert projection == {
        "image_proj.latents": (1, 3, 2),
        "image_proj.proj_in.weight": (2, 5),
        "image_proj.layers.0.0.norm1.weight": (2,),
        "image_proj.layers.0.0.norm1.bias": (2,),
        "image_proj.layers.0.0.to_q.weight": (4, 2),
        "image_proj.layers.0.0.to_kv.weight": (8, 2),
        "image_proj.layers.0.1.3.weight": (2, 4),
    }
    keys, values = np.split(tensors["image_proj.layers.0.0.to_kv.weight"], 2)
    assert np.all(keys == 2.0) and np.all(values == 3.0)


def test_from_flax_is_the_inverse():
    tensors = ip_adapter.from_flax(UNET, RESAMPLER)
    unet, adapter = ip_adapter.to_diffusers(tensors, UNET)
    name = "up_blocks.0.attentions.9.transformer_blocks.0.attn2.processor.to_v_ip.0.weight"
    np.testing.assert_array_equal(unet[name], -2.0)
    assert len(unet) == 8
    assert adapter["layers.0.attn.to_v.weight"].shape == (4, 2)
    assert np.all(np.asarray(adapter["layers.0.attn.to_v.weight"]) == 3.0)
    assert "layers.0.ff.1.net.2.weight" in adapter


def test_plain_ip_adapter():
    projection = {"image_embeds": {"kernel": np.ones((2, 6))}, "norm": {"scale": np.ones(3)}}
    tensors = ip_adapter.from_flax(UNET, projection)
    assert tensors["image_proj.proj.weight"].shape == (6, 2)
    _, adapter = ip_adapter.to_diffusers(tensors, UNET)
    assert set(adapter) == {"image_embeds.weight", "norm.weight"}


def test_errors_name_all_misfits():
    tensors = ip_adapter.from_flax(UNET, RESAMPLER)
    tensors["ip_adapter.9.to_k_ip.weight"] = tensors.pop("ip_adapter.7.to_k_ip.weight")
    with pytest.raises(
        UserError,
        match="1 missing: ip_adapter.7.to_k_ip.weight; 1 unexpected: ip_adapter.9.to_k_ip.weight",
    ):
        ip_adapter.to_diffusers(tensors, UNET)


def test_adapters_that_diffusers_would_misread():
    assert ip_adapter.diffusers_mismatch(SubjectAdapterConfig()) is None
    plain = SubjectAdapterConfig(kind="projection", head_dim=3, num_tokens=4)
    assert ip_adapter.diffusers_mismatch(plain) is None
    assert ip_adapter.diffusers_mismatch(SubjectAdapterConfig(kind="projection")) == (
        "the subject adapter has num_tokens = 16 (not 4)"
    )
    assert ip_adapter.diffusers_mismatch(SubjectAdapterConfig(depth=2, head_dim=16)) == (
        "the subject adapter has depth = 2 (not 4), head_dim = 16 (not 64)"
    )
