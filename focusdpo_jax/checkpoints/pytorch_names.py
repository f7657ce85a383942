"""Tensor names and layouts of diffusers, transformers and PEFT, to and from our parameters.

Our modules are named after the tensors of those files, so that one rule covers every model:

    down_blocks_0/resnets_1/conv1/kernel  <->  down_blocks.0.resnets.1.conv1.weight

A dense kernel [in, out] is the transpose of PyTorch's. A convolution kernel [h, w, in, out] is
stored as [out, in, h, w]. The `scale` of a norm and the table of an embedding are stored unchanged
as `weight`. `_RENAMED` lists the exceptions; `ip_adapter` converts IP-Adapter's own layout.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.parameters import Params, Path, flatten

# Names that end in _N in the files, too, and not in .N.
_KEPT = re.compile(r"linear_[12]$")
# In diffusers the projections of the image branch belong to the attention processor.
_RENAMED = {"to_k_ip": "processor.to_k_ip.0", "to_v_ip": "processor.to_v_ip.0"}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
}
# Buffers in older files that are not parameters.
_IGNORED = re.compile(r"(^|\.)position_ids$")
# Most names in a message.
_LISTED = 20


def torch_name(path: Path) -> str:
    """Returns the PyTorch name of a parameter: ("to_out_0", "kernel") -> "to_out.0.weight"."""
    parts = []
    for part in path[:-1]:
        if part in _RENAMED:
            part = _RENAMED[part]
        elif not _KEPT.match(part):
            part = re.sub(r"_(\d+)$", r".\1", part)
        parts.append(part)
    return ".".join(parts + [_LEAVES.get(path[-1], path[-1])])


def _axes(path: Path, rank: int) -> tuple[int, ...]:
    """Returns the permutation of our axes to PyTorch's; its argsort is the inverse."""
    if path[-1] in ("kernel", "lora_a", "lora_b"):
        return (3, 2, 0, 1) if rank == 4 else (1, 0)
    return tuple(range(rank))


def lay_out(params: Params) -> dict[str, np.ndarray]:
    """Converts a parameter tree to PyTorch names and axes; the arrays are views."""
    return {
        torch_name(path): np.transpose(np.asarray(leaf), _axes(path, np.ndim(leaf)))
        for path, leaf in flatten(stacking.split(params)).items()
    }


def names(params: Params) -> list[str]:
    """Returns the PyTorch names of a parameter tree of arrays or shapes."""
    return [torch_name(path) for path in flatten(stacking.split(params))]


def from_flax(params: Params) -> dict[str, np.ndarray]:
    """Converts a parameter tree to PyTorch names and axes.

    Args:
      params: nested dict of arrays, without the outer "params".

    Returns:
      dict from PyTorch name to a contiguous numpy array of the same type.
    """
    return {name: np.ascontiguousarray(value) for name, value in lay_out(params).items()}


def to_flax(
    tensors: Mapping[str, Any],
    template: Params,
    source: str = "checkpoint",
    place: Callable[[Path, np.ndarray], Any] = stacking.keep_array,
) -> dict[str, Any]:
    """Converts PyTorch tensors to our parameter tree.

    Tensors are read one after the other, after all names and shapes have been checked.

    Args:
      tensors, template, source: see `fit`.
      place: function of a path and a numpy array in our layout that returns the leaf.

    Returns:
      A tree like `template`; by default of numpy arrays in the types of `tensors`.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; it names all of them.
    """
    return stacking.join(fit(tensors, template, source), template, place=place)


def fit(
    tensors: Mapping[str, Any], template: Params, source: str = "checkpoint"
) -> dict[Path, tensor_file.LazyTensor]:
    """Finds the tensor of every parameter and checks names and shapes; no tensor is read.

    Args:
      tensors: dict from PyTorch name to numpy array or `tensor_file.LazyTensor`.
      template: the expected tree of arrays or `jax.ShapeDtypeStruct`s (see `jax.eval_shape`),
        without the outer "params".
      source: name of the file for messages.

    Returns:
      {path in `stacking.split(template)`: LazyTensor in our order of axes}.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; it names all of them.
    """
    tensors = {name: value for name, value in tensors.items() if not _IGNORED.search(name)}
    root = next(iter(template)) + "."
    if len(template) == 1 and not any(name.startswith(root) for name in tensors):
        # transformers 5 omits the outermost module's name if an encoder has no projection.
        tensors = {root + name: value for name, value in tensors.items()}
    found, missing, misshaped = {}, [], []
    expected = flatten(stacking.split(template))
    for path, leaf in expected.items():
        name, axes = torch_name(path), _axes(path, len(leaf.shape))
        if name not in tensors:
            missing.append(name)
            continue
        shape = tuple(leaf.shape[axis] for axis in axes)
        if tensors[name].shape != shape:
            misshaped.append(f"{name} is {tensors[name].shape}, not {shape}")
            continue
        found[path] = tensor_file.LazyTensor.of(tensors[name]).map(
            functools.partial(np.transpose, axes=np.argsort(axes))
        )
    unexpected = sorted(set(tensors) - {torch_name(path) for path in expected})
    require_fit(
        source, {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    )
    return found


def require_fit(source: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raises one UserError that lists all problems, if there are any.

    Args:
      source: name of the file.
      problems: {kind of problem: names of tensors}.
    """
    listed = [_listing(kind, names) for kind, names in problems.items() if names]
    if listed:
        raise UserError(f"{source} does not fit the configured model: " + "; ".join(listed))


def _listing(kind: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {shown}{rest}"
