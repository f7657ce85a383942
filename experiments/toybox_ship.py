r"""Copies a model folder into the package, with its tensors in float16.

    python -m experiments.toybox_ship --model=runs/toybox_base_generator/model --name=toybox
    python -m experiments.toybox_ship --model=runs/toybox_base_confusion/model --name=toybox-leaky

Half precision halves the size of the package. Models are computed in float32 after they are read.
"""

import pathlib
import shutil

import numpy as np
from absl import flags

from focusdpo_jax import command

_MODEL = flags.DEFINE_string("model", None, "Model folder that a run wrote.")
_NAME = flags.DEFINE_enum("name", None, ["toybox", "toybox-leaky"], "Its name in the package.")


def ship(model: pathlib.Path, folder: pathlib.Path) -> int:
    """Writes `folder` anew; returns its size in bytes.

    Raises:
      UserError: `model` is not a complete model folder, or a value does not fit float16.
    """
    from focusdpo_jax.checkpoints import model_folder, tensor_file
    from focusdpo_jax.errors import UserError

    model_folder.load_config(model)
    # The shipped model is replaced once the new one is complete.
    written = folder.with_name(f".{folder.name}.new")
    if written.exists():
        shutil.rmtree(written)
    written.mkdir(parents=True)
    for path in sorted(model.glob("*.safetensors")):
        tensors, _ = tensor_file.read(path)
        with np.errstate(over="ignore"):  # Checked below.
            half = {name: np.asarray(tensor).astype(np.float16) for name, tensor in tensors.items()}
        for name, value in half.items():
            if not np.isfinite(value).all():
                raise UserError(f"{path}: {name} has values that float16 cannot hold")
        tensor_file.write(written / path.name, half)
    shutil.copytree(model / "tokenizer", written / "tokenizer")
    shutil.copy(model / "model.json", written / "model.json")
    if folder.exists():
        shutil.rmtree(folder)
    written.rename(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if not path.is_dir())


def main() -> None:
    """Ships the model of the flags."""
    # After the flags, so that --help is quick.
    from focusdpo_jax.training import models

    model, name = _MODEL.value, _NAME.value
    assert model and name  # Both flags are required.
    folder = pathlib.Path(models.shipped(name))
    size = ship(pathlib.Path(model), folder)
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "name"])
    command.run(main)
