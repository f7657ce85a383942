"""DINO and DINOv2 in transformers' folders: `config.json` and `model.safetensors`, or its shards.

DINO is published as a ViTModel (facebook/dino-vits16), DINOv2 as a Dinov2Model
(facebook/dinov2-small and larger). Our modules have the second's names, which `pytorch_names` maps;
the first's are translated to them here.
"""

import re

import jax
import numpy as np
from etils import epath

from focusdpo_jax.checkpoints import diffusers_configs, pytorch_names, weight_files
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.dino import DINO, DINOConfig

# Parts of a layer: a ViTModel's name, a Dinov2Model's.
_VIT = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_LAYER = re.compile(r"(encoder\.layer\.\d+)\.(.*)\.(weight|bias)$")
# What features have no use for: the stand-in for patches hidden in pre-training, and a ViTModel's
# pooler, which DINO never trained.
_UNUSED = re.compile(r"embeddings\.mask_token$|pooler\.")
# What the modules do, and a file may say otherwise.
_FIXED = {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False}


def read_config(values, source="config.json"):
    """The sizes from the values of a `config.json`.

    Args:
      values: dict with `model_type` "vit" or "dinov2".
      source: what to call the file in a message.

    Returns:
      A `DINOConfig`.

    Raises:
      UserError: a value is missing, or asks for what the modules do not do.
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


def to_dinov2(tensors):
    """Tensors of either layout under a Dinov2Model's names, without those that are not used."""
    renamed = {}
    for name, value in tensors.items():
        layer = _LAYER.match(name)
        if layer and layer[2] in _VIT:
            name = f"{layer[1]}.{_VIT[layer[2]]}.{layer[3]}"
        if not _UNUSED.match(name):
            renamed[name] = value
    return renamed


def load(folder):
    """Reads a transformers folder.

    Args:
      folder: anything that `epath.Path` takes.

    Returns:
      The module `DINO`, which computes in float32, and its parameters as float32 numpy arrays.

    Raises:
      UserError: a file is missing or damaged, or they do not fit each other.
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
