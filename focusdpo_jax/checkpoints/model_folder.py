"""A generator in a folder: what a run leaves, what ships with the package, what a run starts from.

    model.json                  the sizes of every part (GeneratorConfig), and the step of the run that
                                wrote the folder; written last, so that a folder without it is unfinished
    <part>.safetensors          one file for each part of the parameter tree, names joined by "/"
    tokenizer/                  vocab.json and merges.txt of CLIP's byte-pair encoding

A part whose file is missing is made anew at random by whoever loads the folder.
"""

import json

from etils import epath
from flax import traverse_util

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import GeneratorConfig


def save_part(folder, name, tree):
    """Writes one part's parameter tree in the types that it has, tensor by tensor."""
    tensor_file.write(
        epath.Path(folder) / f"{name}.safetensors",
        traverse_util.flatten_dict(stacking.split(tree), sep="/"),
    )


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
        expected = {
            k: v.shape
            for k, v in traverse_util.flatten_dict(stacking.split(example), sep="/").items()
        }
        wrong = [f"missing {k}" for k in sorted(expected.keys() - tensors.keys())]
        wrong += [f"unexpected {k}" for k in sorted(tensors.keys() - expected.keys())]
        wrong += [
            f"{k} is {tensors[k].shape}, not {expected[k]}"
            for k in sorted(expected)
            if k in tensors and tensors[k].shape != expected[k]
        ]
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


def begin(folder):
    """Makes a folder that is about to be written, or written anew: without a `model.json` it is no model."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)


def save_config(folder, config, step=None):
    """Writes `model.json`, after everything else.

    Args:
      config: the `GeneratorConfig`.
      step: of the run whose weights these are; None for a model that is of no run.
    """
    values = json.loads(config.to_json()) | ({} if step is None else {"step": step})
    replace_file(
        epath.Path(folder) / "model.json", json.dumps(values, indent=2, sort_keys=True) + "\n"
    )


def load_step(folder):
    """The step that `model.json` records, or None.

    Raises:
      OSError, ValueError: there is no `model.json`, or it is damaged.
    """
    values = json.loads((epath.Path(folder) / "model.json").read_text())
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values.get("step")


def load_config(folder):
    """Reads `model.json`.

    Raises:
      UserError: it is missing or damaged.
    """
    path = epath.Path(folder) / "model.json"
    try:
        values = json.loads(path.read_text())
        values.pop("step", None)
        return GeneratorConfig.from_dict(values)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}). Point "
            "config.model.pretrained to a folder that has a model.json."
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
