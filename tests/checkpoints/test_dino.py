import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from focusdpo_jax.checkpoints import dino, pytorch_names, tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.dino import DINOConfig

# The values that facebook/dino-vits16 and facebook/dinov2-small have, as far as they matter.
DINO_S16 = {
    "model_type": "vit",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "image_size": 224,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
}
DINOV2_S14 = {
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
TINY = {
    "hidden_size": 8,
    "image_size": 6,
    "patch_size": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "mlp_ratio": 1.5,
}
# A layer of each layout: names and shapes in PyTorch.
LAYERS = {
    "vit": {
        "layernorm_before": (8,),
        "attention.attention.query": (8, 8),
        "attention.attention.key": (8, 8),
        "attention.attention.value": (8, 8),
        "attention.output.dense": (8, 8),
        "layernorm_after": (8,),
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
    },
    "dinov2": {
        "norm1": (8,),
        "attention.attention.query": (8, 8),
        "attention.attention.key": (8, 8),
        "attention.attention.value": (8, 8),
        "attention.output.dense": (8, 8),
        "norm2": (8,),
        "mlp.fc1": (12, 8),
        "mlp.fc2": (8, 12),
    },
}


def published(kind):
    """Tensors of a small network under the names of the published files."""
    shapes = {
        "embeddings.cls_token": (1, 1, 8),
        "embeddings.position_embeddings": (1, 10, 8),
        "embeddings.patch_embeddings.projection.weight": (8, 3, 2, 2),
        "embeddings.patch_embeddings.projection.bias": (8,),
        "layernorm.weight": (8,),
        "layernorm.bias": (8,),
    }
    for number in range(2):
        for name, shape in LAYERS[kind].items():
            shapes[f"encoder.layer.{number}.{name}.weight"] = shape
            shapes[f"encoder.layer.{number}.{name}.bias"] = shape[:1]
        if kind == "dinov2":
            shapes[f"encoder.layer.{number}.layer_scale1.lambda1"] = (8,)
            shapes[f"encoder.layer.{number}.layer_scale2.lambda1"] = (8,)
    unused = (
        {"pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)}
        if kind == "vit"
        else {"embeddings.mask_token": (1, 8)}
    )
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float16) for name, shape in (shapes | unused).items()
    }


def write(folder, values, tensors):
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(safetensors.save(tensors))


def test_configs():
    assert dino.read_config(DINO_S16) == DINOConfig()
    assert dino.read_config(DINOV2_S14) == DINOConfig(
        image_size=518, patch_size=14, epsilon=1e-6, layer_scale=True
    )


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
    np.testing.assert_array_equal(
        layer["norm2"]["scale"], tensors[f"encoder.layer.1.{theirs[0]}.weight"]
    )
    np.testing.assert_array_equal(
        layer["mlp"]["fc2"]["kernel"].T, tensors[f"encoder.layer.1.{theirs[1]}.weight"]
    )
    np.testing.assert_array_equal(
        layer["attention"]["output"]["dense"]["bias"],
        tensors["encoder.layer.1.attention.output.dense.bias"],
    )
    # All tensors are used except the mask token and the pooler.
    assert len(pytorch_names.from_flax(params)) == len(tensors) - (2 if kind == "vit" else 1)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "swin"}, "model_type = 'swin': .*'dinov2'"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new': only 'gelu'"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn = True: only False"),
        ({"image_size": [224, 196]}, r"image_size = \[224, 196\]: only squares"),
    ],
)
def test_configs_that_do_not_fit(changed, message):
    with pytest.raises(UserError, match=message):
        dino.read_config(DINOV2_S14 | changed)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="config.json cannot be read .No such file"):
        dino.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DINO_S16 | TINY))
    with pytest.raises(
        UserError, match="missing: .*model.safetensors. Weights are read only from safetensors"
    ):
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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_type_and_shards(dtype, shards, tmp_path):
    """The same network, rounded to the type of the file."""
    tensors = {name: value.astype(dtype) for name, value in published("dinov2").items()}
    write_weights(tmp_path, tensors, shards)
    (tmp_path / "config.json").write_text(json.dumps(DINOV2_S14 | TINY))
    _, params = dino.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    for name, value in pytorch_names.from_flax(params).items():
        np.testing.assert_array_equal(value, tensors[name].astype(np.float32))


def write_weights(folder, tensors, shards):
    """model.safetensors, or so many shards and their index."""
    if shards == 1:
        tensor_file.write(folder / "model.safetensors", tensors)
        return
    listed = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(sorted(tensors.items())[number::shards])
        tensor_file.write(folder / name, part)
        listed |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_missing_shards(tmp_path):
    write_weights(tmp_path, published("dinov2"), 3)
    (tmp_path / "config.json").write_text(json.dumps(DINOV2_S14 | TINY))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match="missing: .*model-00002-of-00003.safetensors. Weights are read only from"
    ):
        dino.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        UserError, match=r"00003.safetensors \(a .bin is a pickle, .*: pytorch_model.bin\)"
    ):
        dino.load(tmp_path)
    for listed in ({}, {"a": "../model.safetensors"}, {"a": 3}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(UserError, match="index.json is damaged: its weight_map names no files"):
            dino.load(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="model.safetensors is a pointer of git-lfs"):
        dino.load(tmp_path)
