"""Tensor names and layouts of diffusers, transformers, PEFT and IP-Adapter files, both ways.

Our modules are named after the tensors of those files, so one rule covers every model:

    down_blocks_0/resnets_1/conv1/kernel  <->  down_blocks.0.resnets.1.conv1.weight

A dense kernel [in, out] is the transpose of PyTorch's, a convolution kernel [h, w, in, out] is
stored as [out, in, h, w], a norm's `scale` and an embedding table are stored as they are under
`weight`. The exceptions are listed in `_RENAMED`, and IP-Adapter's own layout has a function.
"""

import functools
import re

import flax.traverse_util
import numpy as np

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking

# Components that end in _N in the files, too, where .N would be the rule.
_KEPT = re.compile(r"linear_[12]$")
# diffusers keeps the image branch's projections inside the attention processor.
_RENAMED = {"to_k_ip": "processor.to_k_ip.0", "to_v_ip": "processor.to_v_ip.0"}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
}
# Buffers that older files carry and that are no parameters.
_IGNORED = re.compile(r"(^|\.)position_ids$")
# What a message lists before it counts the rest.
_LISTED = 20


def torch_name(path):
    """The PyTorch name of a parameter, as ("to_out_0", "kernel") -> "to_out.0.weight"."""
    parts = []
    for part in path[:-1]:
        if part in _RENAMED:
            part = _RENAMED[part]
        elif not _KEPT.match(part):
            part = re.sub(r"_(\d+)$", r".\1", part)
        parts.append(part)
    return ".".join(parts + [_LEAVES.get(path[-1], path[-1])])


def _axes(path, rank):
    """The order that our axes have in PyTorch's tensor; its argsort leads back."""
    if path[-1] in ("kernel", "lora_a", "lora_b"):
        return (3, 2, 0, 1) if rank == 4 else (1, 0)
    return tuple(range(rank))


def lay_out(params):
    """Names a parameter tree as PyTorch does; the arrays are views in PyTorch's order of axes."""
    return {
        torch_name(path): np.transpose(np.asarray(leaf), _axes(path, np.ndim(leaf)))
        for path, leaf in flax.traverse_util.flatten_dict(stacking.split(params)).items()
    }


def names(params):
    """The PyTorch names of a parameter tree, of arrays or shapes."""
    return [torch_name(path) for path in flax.traverse_util.flatten_dict(stacking.split(params))]


def from_flax(params):
    """Names and lays out a parameter tree as PyTorch does.

    Args:
      params: nested dict of arrays, without the outer "params".

    Returns:
      dict from PyTorch name to a contiguous numpy array of the same type.
    """
    return {name: np.ascontiguousarray(value) for name, value in lay_out(params).items()}


def to_flax(tensors, template, source="checkpoint", place=stacking.as_it_is):
    """Names and lays out PyTorch tensors as our parameter tree.

    Args:
      tensors, template, source: see `fit`; tensors are read only when all of them fit, one after
        the other.
      place: function of a path and a numpy array in our layout; the leaf is what it returns.

    Returns:
      A tree like `template`; by itself of numpy arrays in the types of `tensors`.

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape.
    """
    return stacking.join(fit(tensors, template, source), template, place=place)


def fit(tensors, template, source="checkpoint"):
    """Finds the tensor of every parameter by names and shapes alone; no tensor is read.

    Args:
      tensors: dict from PyTorch name to numpy array or `tensor_file.LazyTensor`.
      template: the tree expected, of arrays or `jax.ShapeDtypeStruct`s (see `jax.eval_shape`),
        without the outer "params".
      source: what to call the file in a message.

    Returns:
      {path in `stacking.split(template)`: LazyTensor in our order of axes}.

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape.
    """
    tensors = {name: value for name, value in tensors.items() if not _IGNORED.search(name)}
    root = next(iter(template)) + "."
    if len(template) == 1 and not any(name.startswith(root) for name in tensors):
        # transformers 5 writes a tower that has no projection without its outermost module.
        tensors = {root + name: value for name, value in tensors.items()}
    found, missing, misshaped = {}, [], []
    expected = flax.traverse_util.flatten_dict(stacking.split(template))
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


def require_fit(source, problems):
    """Raises one UserError over `problems`, {kind: names of tensors}, unless all are empty."""
    listed = [_listing(kind, names) for kind, names in problems.items() if names]
    if listed:
        raise UserError(f"{source} does not fit the configured model: " + "; ".join(listed))


def _listing(kind, names):
    shown = ", ".join(names[:_LISTED])
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {shown}{rest}"
