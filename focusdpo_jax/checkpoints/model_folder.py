"""A generator in a folder: what a run leaves, what ships with the package, what a run starts from.

    model.json                  the sizes of every part (GeneratorConfig)
    <part>.safetensors          one file for each part of the parameter tree, names joined by "/"
    tokenizer/                  vocab.json and merges.txt of CLIP's byte-pair encoding

A part whose file is missing is made anew at random by whoever loads the folder.
"""

from etils import epath
from flax import traverse_util

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import GeneratorConfig


def save_part(folder, name, tree):
    """Writes one part's parameter tree in the types that it has, tensor by tensor."""
    tensor_file.write(epath.Path(folder) / f"{name}.safetensors",
                      traverse_util.flatten_dict(stacking.split(tree), sep="/"))


def open_part(folder, name, example=None):
    """Finds the tensors of one part and checks names and shapes; only the header is read.

    Args:
      example: a tree of the shapes that are expected, which the file must match; None takes what it
        has.

    Returns:
      {path in `stacking.split(example)`: LazyTensor}; None where the folder has no such file.

    Raises:
      UserError: the file cannot be read, or tensors are missing, unexpected or of another shape.
    """
    path = epath.Path(folder) / f"{name}.safetensors"
    if not path.exists():
        return None
    tensors, _ = tensor_file.read(path)
    if example is not None:
        expected = {k: v.shape for k, v in traverse_util.flatten_dict(
            stacking.split(example), sep="/").items()}
        wrong = [f"missing {k}" for k in sorted(expected.keys() - tensors.keys())]
        wrong += [f"unexpected {k}" for k in sorted(tensors.keys() - expected.keys())]
        wrong += [f"{k} is {tensors[k].shape}, not {expected[k]}" for k in sorted(expected)
                  if k in tensors and tensors[k].shape != expected[k]]
        if wrong:
            raise UserError(f"{path} does not fit model.json: {'; '.join(wrong)}.")
    return {tuple(key.split("/")): tensor for key, tensor in tensors.items()}


def load_part(folder, name, example=None, *, dtype=None, sharding=None):
    """Reads one part, tensor by tensor, or returns None where the folder has no such file.

    Args:
      folder, name, example: see `open_part`.
      dtype, sharding: see `tensor_file.placement`.

    Raises:
      UserError: see `open_part`.
    """
    opened = open_part(folder, name, example)
    if example is None and opened is not None:
        example = traverse_util.unflatten_dict(opened)
    return tensor_file.load(opened, example, dtype, sharding)


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
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
