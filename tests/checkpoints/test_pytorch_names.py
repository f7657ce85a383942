import numpy as np
import pytest

from focusdpo_jax.checkpoints import pytorch_names
from focusdpo_jax.errors import UserError

PARAMS = {
    "time_embedding": {"linear_1": {"kernel": np.arange(6.0).reshape(2, 3)}},
    "down_blocks_1": {
        "resnets_0": {
            "conv1": {"kernel": np.arange(18.0).reshape(3, 3, 1, 2), "bias": np.zeros(2)},
            "norm1": {"scale": np.ones(2)},
        }
    },
    "attn2": {
        "to_out_0": {
            "kernel": np.ones((2, 2)),
            "lora_a": np.arange(4.0).reshape(4, 1),
            "lora_b": np.arange(3.0).reshape(1, 3),
        },
        "to_k_ip": {"kernel": np.arange(8.0).reshape(4, 2)},
    },
    "token_embedding": {"embedding": np.arange(10.0).reshape(5, 2)},
    "latents": np.zeros((1, 2, 3)),
}


def test_names_and_layouts():
    tensors = pytorch_names.from_flax(PARAMS)
    assert {name: value.shape for name, value in tensors.items()} == {
        "time_embedding.linear_1.weight": (3, 2),
        "down_blocks.1.resnets.0.conv1.weight": (2, 1, 3, 3),
        "down_blocks.1.resnets.0.conv1.bias": (2,),
        "down_blocks.1.resnets.0.norm1.weight": (2,),
        "attn2.to_out.0.weight": (2, 2),
        "attn2.to_out.0.lora_A.weight": (1, 4),
        "attn2.to_out.0.lora_B.weight": (3, 1),
        "attn2.processor.to_k_ip.0.weight": (2, 4),
        "token_embedding.weight": (5, 2),
        "latents": (1, 2, 3),
    }
    # Row 1, column 2, input 0, output 1 of the kernel.
    assert tensors["down_blocks.1.resnets.0.conv1.weight"][1, 0, 1, 2] == 2 * (3 * 1 + 2) + 1
    assert tensors["time_embedding.linear_1.weight"][2, 1] == 5
    assert all(value.flags.c_contiguous for value in tensors.values())
    back = pytorch_names.to_flax(tensors, PARAMS)
    np.testing.assert_equal(back, PARAMS)


def test_one_error_names_all_misfits():
    tensors = pytorch_names.from_flax(PARAMS)
    del tensors["latents"]
    tensors["extra.weight"] = np.zeros(3)
    tensors["token_embedding.weight"] = np.zeros((6, 2))
    tensors["embeddings.position_ids"] = np.arange(3)
    with pytest.raises(UserError) as error:
        pytorch_names.to_flax(tensors, PARAMS, "unet.safetensors")
    assert str(error.value) == (
        "unet.safetensors does not fit the configured model: 1 missing: latents; "
        "1 unexpected: extra.weight; "
        "1 of another shape: token_embedding.weight is (6, 2), not (5, 2)"
    )


def test_an_encoder_without_its_outermost_module():
    template = {"text_model": {"final_layer_norm": {"scale": np.ones(2)}}}
    for name in ("final_layer_norm.weight", "text_model.final_layer_norm.weight"):
        params = pytorch_names.to_flax({name: np.array([3.0, 4.0])}, template)
        np.testing.assert_equal(
            params, {"text_model": {"final_layer_norm": {"scale": np.array([3.0, 4.0])}}}
        )
