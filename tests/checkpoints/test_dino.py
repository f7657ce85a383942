import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from focusdpo_jax.checkpoints import dino, pytorch_names
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.dino import DINOConfig

# The values that facebook/dino-vits16 and facebook/dinov2-small have, as far as they matter.
DINO_S16 = {"model_type": "vit", "hidden_act": "gelu", "hidden_size": 384, "image_size": 224,
            "intermediate_size": 1536, "layer_norm_eps": 1e-12, "num_attention_heads": 6,
            "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True}
DINOV2_S14 = {"model_type": "dinov2", "hidden_act": "gelu", "hidden_size": 384, "image_size": 518,
              "layer_norm_eps": 1e-6, "mlp_ratio": 4, "num_attention_heads": 6, "num_channels": 3,
              "num_hidden_layers": 12, "patch_size": 14, "qkv_bias": True, "use_swiglu_ffn": False}
TINY = {"hidden_size": 8, "image_size": 6, "patch_size": 2, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "mlp_ratio": 1.5}
# What a layer of each layout has: names and shapes in PyTorch.
LAYERS = {
    "vit": {"layernorm_before": (8,), "attention.attention.query": (8, 8),
            "attention.attention.key": (8, 8), "attention.attention.value": (8, 8),
            "attention.output.dense": (8, 8), "layernorm_after": (8,),
            "intermediate.dense": (12, 8), "output.dense": (8, 12)},
    "dinov2": {"norm1": (8,), "attention.attention.query": (8, 8),
               "attention.attention.key": (8, 8), "attention.attention.value": (8, 8),
               "attention.output.dense": (8, 8), "norm2": (8,), "mlp.fc1": (12, 8),
               "mlp.fc2": (8, 12)}}


def published(kind):
    """Tensors of a small network under the names of the published files."""
    shapes = {"embeddings.cls_token": (1, 1, 8), "embeddings.position_embeddings": (1, 10, 8),
              "embeddings.patch_embeddings.projection.weight": (8, 3, 2, 2),
              "embeddings.patch_embeddings.projection.bias": (8,),
              "layernorm.weight": (8,), "layernorm.bias": (8,)}
    for number in range(2):
        for name, shape in LAYERS[kind].items():
            shapes[f"encoder.layer.{number}.{name}.weight"] = shape
            shapes[f"encoder.layer.{number}.{name}.bias"] = shape[:1]
        if kind == "dinov2":
            shapes[f"encoder.layer.{number}.layer_scale1.lambda1"] = (8,)
            shapes[f"encoder.layer.{number}.layer_scale2.lambda1"] = (8,)
    unused = ({"pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)} if kind == "vit"
              else {"embeddings.mask_token": (1, 8)})
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float16)
            for name, shape in (shapes | unused).items()}


def write(folder, values, tensors):
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(safetensors.save(tensors))


def test_configs():
    assert dino.read_config(DINO_S16) == DINOConfig()
    assert dino.read_config(DINOV2_S14) == DINOConfig(
        image_size=518, patch_size=14, epsilon=1e-6, layer_scale=True)


@pytest.mark.parametrize("values", [DINO_S16, DINOV2_S14])
def test_folder(values, tmp_path):
    kind = values["model_type"]
    tensors = published(kind)
    write(tmp_path, values | TINY, tensors)
    model, params = dino.load(tmp_path)
    assert model.config.intermediate_size == 12
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    layer = params["encoder"]["layer_1"]
    theirs = {"vit": ("layernorm_after", "output.dense"), "dinov2": ("norm2", "mlp.fc2")}[kind]
    np.testing.assert_array_equal(layer["norm2"]["scale"],
                                  tensors[f"encoder.layer.1.{theirs[0]}.weight"])
    np.testing.assert_array_equal(layer["mlp"]["fc2"]["kernel"].T,
                                  tensors[f"encoder.layer.1.{theirs[1]}.weight"])
    np.testing.assert_array_equal(layer["attention"]["output"]["dense"]["bias"],
                                  tensors["encoder.layer.1.attention.output.dense.bias"])
    # Everything is used but the mask token and the pooler.
    assert len(pytorch_names.from_flax(params)) == len(tensors) - (2 if kind == "vit" else 1)


@pytest.mark.parametrize("changed, message", [
    ({"model_type": "swin"}, "model_type = 'swin': .*'dinov2'"),
    ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new': only 'gelu'"),
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn = True: only False"),
    ({"image_size": [224, 196]}, r"image_size = \[224, 196\]: only squares")])
def test_configs_that_do_not_fit(changed, message):
    with pytest.raises(UserError, match=message):
        dino.read_config(DINOV2_S14 | changed)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="config.json cannot be read .No such file"):
        dino.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DINO_S16 | TINY))
    with pytest.raises(UserError, match="model.safetensors is not a readable safetensors file"):
        dino.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        dino.load(tmp_path)
    write(tmp_path, {"model_type": "vit"}, {})
    with pytest.raises(UserError, match="config.json has no 'hidden_size'"):
        dino.load(tmp_path)
    write(tmp_path, DINO_S16 | TINY, published("dinov2"))
    with pytest.raises(UserError, match=r"4 unexpected: encoder.layer.0.layer_scale1.lambda1"):
        dino.load(tmp_path)
