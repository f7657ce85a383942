"""Finds the safetensors files of a folder's weights: one file, or shards with an index.

    STEM.safetensors, STEM.fp16.safetensors
    STEM-00001-of-00002.safetensors, ... and STEM.safetensors.index.json (or ...index.fp16.json)

as diffusers (`diffusion_pytorch_model`) and transformers (`model`) write them.
"""

from etils import epath

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import read_json

_VARIANTS = ("", "fp16")


def find(folder: epath.Path, stem: str, variant: str | None = None) -> list[epath.Path]:
    """Returns the safetensors files of a folder's weights, or an empty list.

    Args:
      folder: folder with the weights.
      stem: STEM of the files' names.
      variant: such as "fp16"; None for the files without a variant or, if there are none, fp16.

    Raises:
      UserError: an index is damaged.
    """
    for kind in _VARIANTS if variant is None else (variant,):
        dot = f".{kind}" if kind else ""
        single = folder / f"{stem}{dot}.safetensors"
        if single.exists():
            return [single]
        for index in (
            folder / f"{stem}.safetensors.index{dot}.json",
            folder / f"{stem}{dot}.safetensors.index.json",
        ):
            if index.exists():
                return [folder / name for name in _shards(index)]
    return []


def _shards(index: epath.Path) -> list[str]:
    """Returns the names of the files in an index."""
    listed = read_json(index).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(name, str) and name and "/" not in name for name in listed.values())
    ):
        raise UserError(f"{index} is damaged: its weight_map names no files.")
    return sorted({*listed.values()})


def missing(folder: epath.Path, stem: str, variant: str | None = None) -> list[str]:
    """Returns the paths of missing weight files, with a note about .bin files in the folder."""
    dot = f".{variant}" if variant else ""
    files = find(folder, stem, variant) or [folder / f"{stem}{dot}.safetensors"]
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.exists() else []
    note = f" (a .bin is a pickle, which is not read: {', '.join(pickles[:3])})" if pickles else ""
    return [f"{path}{note}" for path in files if not path.exists()]


def read(
    folder: epath.PathLike, stem: str, variant: str | None = None
) -> dict[str, tensor_file.LazyTensor]:
    """Opens a folder's weights: {name: LazyTensor}; only headers are read.

    Args:
      folder, stem, variant: see `find`.

    Raises:
      UserError: there are no such files, an index names a shard that is missing, or a file is
        damaged.
    """
    folder = epath.Path(folder)
    lacks = missing(folder, stem, variant)
    if lacks:
        raise UserError(
            f"missing: {', '.join(lacks)}. Weights are read only from safetensors, in one file "
            f"or in all shards that {stem}.safetensors.index.json lists: fetch them again, or "
            "write them with save_pretrained of the library that has the model."
        )
    tensors = {}
    for path in find(folder, stem, variant):
        tensors |= tensor_file.read(path)[0]
    return tensors
