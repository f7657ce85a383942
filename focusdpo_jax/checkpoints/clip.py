"""CLIP with both towers in transformers' folders: `config.json`, `model.safetensors`, tokenizer.

It is published so as a CLIPModel (openai/clip-vit-base-patch32 and its sisters). Such a folder has
the tokenizer's files beside the weights, which may be cut into shards.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from focusdpo_jax.checkpoints import diffusers_configs, pytorch_names, weight_files
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import vocabulary
from focusdpo_jax.models.clip import CLIPText, CLIPVision
from focusdpo_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CLIP:
    """Both towers, computing in float32, and their parameters as float32 numpy arrays.

    Attributes:
      text, image: the modules, both with a projection to one space.
      text_parameters, image_parameters: without the outer "params".
      tokenizer: its row 0 is what `text` reads.
    """

    text: CLIPText
    text_parameters: Any
    image: CLIPVision
    image_parameters: Any
    tokenizer: Tokenizer


def load(folder):
    """Reads a transformers folder.

    Raises:
      UserError: a file is missing or damaged, or they do not fit each other.
    """
    folder = epath.Path(folder)
    path = folder / "config.json"
    values = diffusers_configs.read_file(
        folder, f"config.json, model.safetensors and {vocabulary.NEEDED}"
    )
    if not isinstance(values, dict) or values.get("model_type") != "clip":
        raise UserError(
            f"{path}: model_type is not 'clip': give the folder of a CLIPModel, with both towers."
        )
    tensors = weight_files.read(folder, "model")
    towers = {}
    for name, read, kind, example in (
        (
            "text",
            diffusers_configs.read_clip_text,
            CLIPText,
            jax.ShapeDtypeStruct((1, 2), np.int32),
        ),
        ("vision", diffusers_configs.read_clip_vision, CLIPVision, None),
    ):
        config = read(
            {
                **(values.get(f"{name}_config") or {}),
                "projection_dim": values.get("projection_dim", 512),
                "architectures": ["WithProjection"],
            },
            str(path),
        )
        if example is None:
            side = config.image_size
            example = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        module = kind(config)
        template = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
        projection = "text_projection" if name == "text" else "visual_projection"
        own = {
            key: value
            for key, value in tensors.items()
            if key.startswith((f"{name}_model.", f"{projection}."))
        }
        params = pytorch_names.to_flax(own, template, str(folder))
        towers[name] = module, jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    tokenizer = Tokenizer(folder, towers["text"][0].config.max_length)
    return CLIP(*towers["text"], *towers["vision"], tokenizer)
