"""A generator in a folder: what a run leaves, what ships with the package, what a run starts from.

    model.json                  the sizes of every part (GeneratorConfig)
    <part>.safetensors          one file for each part of the parameter tree, names joined by "/"
    tokenizer/                  vocab.json and merges.txt of CLIP's byte-pair encoding

A part whose file is missing is made anew at random by whoever loads the folder.
"""

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from focusdpo_jax.errors import UserError
from focusdpo_jax.models.generator import GeneratorConfig


def save_part(folder, name, tree):
    """Writes one part's parameter tree in float32."""
    flat = traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    tensors = {key: np.ascontiguousarray(value, np.float32) for key, value in flat.items()}
    path = epath.Path(folder) / f"{name}.safetensors"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(safetensors.save(tensors))
    temporary.replace(path)


def load_part(folder, name, example=None, dtype=np.float32):
    """Reads one part, or returns None where the folder has no such file.

    Args:
      example: a tree of the shapes that are expected; what lies in the file must match it.
      dtype: of the result.

    Raises:
      UserError: the file cannot be read, or tensors are missing, unexpected or of another shape.
    """
    path = epath.Path(folder) / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        tensors = safetensors.load(path.read_bytes())
    except Exception as error:  # safetensors raises its own, undocumented types.
        raise UserError(f"{path} is not a readable safetensors file ({error}).") from error
    tree = {key: np.asarray(value, dtype) for key, value in tensors.items()}
    if example is not None:
        expected = {k: v.shape for k, v in traverse_util.flatten_dict(example, sep="/").items()}
        wrong = [f"missing {k}" for k in sorted(expected.keys() - tree.keys())]
        wrong += [f"unexpected {k}" for k in sorted(tree.keys() - expected.keys())]
        wrong += [f"{k} is {tree[k].shape}, not {expected[k]}" for k in sorted(expected)
                  if k in tree and tree[k].shape != expected[k]]
        if wrong:
            raise UserError(f"{path} does not fit model.json: {'; '.join(wrong)}.")
    return traverse_util.unflatten_dict(tree, sep="/")


def save_config(folder, config):
    """Writes `model.json`."""
    (epath.Path(folder) / "model.json").write_text(config.to_json())


def load_config(folder):
    """Reads `model.json`.

    Raises:
      UserError: it is missing or damaged.
    """
    path = epath.Path(folder) / "model.json"
    try:
        return GeneratorConfig.from_json(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}). Point "
                        "config.model.pretrained to a folder that has a model.json.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
