"""Loads CLIP from a transformers folder: `config.json`, `model.safetensors` and the tokenizer.

This is the layout of published CLIPModels, for example openai/clip-vit-base-patch32. The weights
may be sharded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from focusdpo_jax.checkpoints import diffusers_configs, pytorch_names, weight_files
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import vocabulary
from focusdpo_jax.models.clip import CLIPText, CLIPVision
from focusdpo_jax.models.parameters import Params
from focusdpo_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CLIP:
    """Both encoders in float32, with their parameters as float32 numpy arrays.

    Attributes:
      text, image: the modules; both project to the same space.
      text_parameters, image_parameters: parameter trees, without the outer "params".
      tokenizer: row 0 of its result is the input of `text`.
    """

    text: CLIPText
    text_parameters: Params
    image: CLIPVision
    image_parameters: Params
    tokenizer: Tokenizer


def load(folder: epath.PathLike) -> CLIP:
    """Loads a transformers folder of a CLIPModel.

    Raises:
      UserError: a file is missing or damaged, or the files do not fit each other.
    """
    folder = epath.Path(folder)
    path = folder / "config.json"
    values = diffusers_configs.read_file(
        folder, f"config.json, model.safetensors and {vocabulary.NEEDED}"
    )
    if not isinstance(values, dict) or values.get("model_type") != "clip":
        raise UserError(
            f"{path}: model_type is not 'clip': give the folder of a CLIPModel, with both encoders."
        )
    tensors = weight_files.read(folder, "model")
    text = CLIPText(
        diffusers_configs.read_clip_text(_encoder_values(values, "text_config"), str(path))
    )
    image = CLIPVision(
        diffusers_configs.read_clip_vision(_encoder_values(values, "vision_config"), str(path))
    )
    side = image.config.image_size
    return CLIP(
        text,
        _load_parameters(
            tensors,
            ("text_model.", "text_projection."),
            text,
            jax.ShapeDtypeStruct((1, 2), np.int32),
            str(folder),
        ),
        image,
        _load_parameters(
            tensors,
            ("vision_model.", "visual_projection."),
            image,
            jax.ShapeDtypeStruct((1, side, side, 3), np.float32),
            str(folder),
        ),
        Tokenizer(folder, text.config.max_length),
    )


def _encoder_values(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Returns the config.json that a single encoder of a CLIPModel would have."""
    return {
        **(values.get(field) or {}),
        "projection_dim": values.get("projection_dim", 512),
        "architectures": ["WithProjection"],
    }


def _load_parameters(
    tensors: Mapping[str, Any],
    prefixes: tuple[str, ...],
    module: nn.Module,
    example: jax.ShapeDtypeStruct,
    source: str,
) -> Params:
    """Reads the tensors whose names have one of the prefixes, as float32 parameters of a module."""
    template = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    own = {name: value for name, value in tensors.items() if name.startswith(prefixes)}
    params = pytorch_names.to_flax(own, template, source)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)
