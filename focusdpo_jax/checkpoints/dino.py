"""DINO and DINOv2 from transformers folders: `config.json` and `model.safetensors`, or its shards.

DINO is published as a ViTModel (facebook/dino-vits16), DINOv2 as a Dinov2Model
(facebook/dinov2-small and larger). Our modules have the names of a Dinov2Model, which
`pytorch_names` maps; this module translates those of a ViTModel.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from focusdpo_jax.checkpoints import diffusers_configs, pytorch_names, weight_files
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.dino import DINO, DINOConfig
from focusdpo_jax.models.parameters import Params

# Submodules of a layer: the name in a ViTModel, and in a Dinov2Model.
_VIT = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_LAYER = re.compile(r"(encoder\.layer\.\d+)\.(.*)\.(weight|bias)$")
# Tensors that the features do not depend on: the mask token of DINOv2's pre-training, and the
# pooler of a ViTModel, which DINO never trained.
_UNUSED = re.compile(r"embeddings\.mask_token$|pooler\.")
# Fields with the one value that the modules implement.
_FIXED = {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False}


def read_config(values: Mapping[str, Any], source: epath.PathLike = "config.json") -> DINOConfig:
    """Converts the values of a `config.json`.

    Args:
      values: dict with `model_type` "vit" or "dinov2".
      source: name of the file for messages.

    Raises:
      UserError: a value is missing, or the modules do not implement it.
    """
    kind = values.get("model_type")
    if kind not in ("vit", "dinov2"):
        raise UserError(
            f"{source}: model_type = {kind!r}: give a folder of 'vit' (DINO) or 'dinov2'"
        )
    for name, value in _FIXED.items():
        if values.get(name, value) != value:
            raise UserError(f"{source}: {name} = {values[name]!r}: only {value!r} is supported")
    for name in ("image_size", "patch_size"):
        if isinstance(values.get(name), list):
            raise UserError(
                f"{source}: {name} = {values[name]}: only squares, in one number, are supported"
            )
    try:
        width = values["hidden_size"]
        return DINOConfig(
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            hidden_size=width,
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            intermediate_size=(
                values["intermediate_size"] if kind == "vit" else int(width * values["mlp_ratio"])
            ),
            epsilon=values["layer_norm_eps"],
            layer_scale=kind == "dinov2",
        )
    except KeyError as error:
        raise UserError(f"{source} has no {error}") from error


def to_dinov2(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Renames tensors of either layout to those of a Dinov2Model, and drops unused ones."""
    renamed = {}
    for name, value in tensors.items():
        layer = _LAYER.match(name)
        if layer and layer[2] in _VIT:
            name = f"{layer[1]}.{_VIT[layer[2]]}.{layer[3]}"
        if not _UNUSED.match(name):
            renamed[name] = value
    return renamed


def load(folder: epath.PathLike) -> tuple[DINO, Params]:
    """Loads a transformers folder.

    Returns:
      The module, which computes in float32, and its parameters as float32 numpy arrays.

    Raises:
      UserError: a file is missing or damaged, or the files do not fit each other.
    """
    folder = epath.Path(folder)
    values = diffusers_configs.read_file(folder, "config.json and model.safetensors")
    model = DINO(read_config(values, folder / "config.json"))
    tensors = weight_files.read(folder, "model")
    side = model.config.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = pytorch_names.to_flax(to_dinov2(tensors), template, str(folder))
    return model, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
