"""The package's own folder layout of a generator, written by runs and shipped with the package.

    model.json                  the sizes of every part (GeneratorConfig), and the step of the run
                                that wrote the folder; written last, so that a folder without it is
                                incomplete
    <part>.safetensors          one file for each part of the parameter tree, keys joined by "/"
    tokenizer/                  vocab.json and merges.txt of CLIP's byte-pair encoding

A part without a file has to be initialised at random by the caller.
"""

import json
from typing import Any

from etils import epath

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator_config import GeneratorConfig
from focusdpo_jax.models.parameters import Params, Path, flatten, unflatten


def save_part(folder: epath.PathLike, name: str, tree: Params) -> None:
    """Writes the parameter tree of one part, tensor by tensor and without changing types."""
    tensor_file.write(epath.Path(folder) / f"{name}.safetensors", _joined(tree))


def _joined(tree: Params) -> dict[str, Any]:
    """Returns {keys joined by "/": leaf}."""
    return {"/".join(path): leaf for path, leaf in flatten(stacking.split(tree)).items()}


def open_part(
    folder: epath.PathLike, name: str, example: Params | None = None
) -> dict[Path, tensor_file.LazyTensor] | None:
    """Finds the tensors of one part and checks their names and shapes; only the header is read.

    Args:
      folder: folder of the model.
      name: name of the part.
      example: tree of arrays or shapes that the file must match; None for no check.

    Returns:
      {path in `stacking.split(example)`: LazyTensor}; None if the folder has no such file.

    Raises:
      UserError: the file cannot be read, or tensors are missing, unexpected or of another shape.
    """
    path = epath.Path(folder) / f"{name}.safetensors"
    if not path.exists():
        return None
    tensors, _ = tensor_file.read(path)
    if example is not None:
        expected = {name: leaf.shape for name, leaf in _joined(example).items()}
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


def load_part(
    folder: epath.PathLike,
    name: str,
    example: Params | None = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
) -> dict[str, Any] | None:
    """Reads one part, tensor by tensor; returns None if the folder has no such file.

    Args:
      folder, name, example: see `open_part`.
      dtype, sharding: see `tensor_file.placement`.

    Raises:
      UserError: see `open_part`.
    """
    opened = open_part(folder, name, example)
    if example is None and opened is not None:
        example = unflatten(opened)
    if opened is None or example is None:
        return None
    return tensor_file.load(opened, example, dtype, sharding)


def begin(folder: epath.PathLike) -> None:
    """Creates a folder to write; removes its `model.json`, so that it is incomplete meanwhile."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)


def save_config(folder: epath.PathLike, config: GeneratorConfig, step: int | None = None) -> None:
    """Writes `model.json`; call it after everything else is written.

    Args:
      folder: folder of the model.
      config: configuration of the generator.
      step: step of the run that trained the weights; None if there is no run.
    """
    values = json.loads(config.to_json()) | ({} if step is None else {"step": step})
    replace_file(
        epath.Path(folder) / "model.json", json.dumps(values, indent=2, sort_keys=True) + "\n"
    )


def load_step(folder: epath.PathLike) -> int | None:
    """Returns the step in `model.json`, or None if it has none.

    Raises:
      OSError, ValueError: there is no `model.json`, or it is damaged.
    """
    values = json.loads((epath.Path(folder) / "model.json").read_text())
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values.get("step")


def load_config(folder: epath.PathLike) -> GeneratorConfig:
    """Reads the configuration in `model.json`.

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
