"""Sharding rules: maps the axes of parameters to axes of the mesh.

Every axis of a parameter has a logical name, which follows from the name of its layer; `RULES` maps
logical names to axes of the mesh. Layers come in pairs (Megatron-LM, arXiv 1909.08053): the first
is column-parallel, with its outputs (heads or hidden units) sharded, the second row-parallel, with
its inputs sharded. So `tensor` needs one all-reduce of activations per pair.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from focusdpo_jax.models.parameters import Params, Path, flatten, unflatten

# Logical axis: mesh axis.
RULES = {"width": "fsdp", "hidden": "tensor"}

# Names of layers of the UNet, the adapter, CLIP, DINO and the autoencoder.
_COLUMN_PARALLEL = {
    "to_q",
    "to_k",
    "to_v",
    "to_k_ip",
    "to_v_ip",
    "q_proj",
    "k_proj",
    "v_proj",
    "query",
    "key",
    "value",
    "net_0",
    "proj",
    "fc1",
    "conv1",
    "time_emb_proj",
}
_ROW_PARALLEL = {"to_out_0", "out_proj", "net_2", "fc2", "conv2"}
# Parameters below this name have a first axis over equal blocks (see `models.stacking`). A loop
# reads one block after the other, so that this axis is never sharded.
_STACKED = "transformer_blocks"


def logical_axes(path: Path, ndim: int) -> tuple[str | None, ...]:
    """Returns the logical names of a parameter's axes; None for an axis that is never sharded.

    Args:
      path: keys from the part on, such as ("unet", "mid_block", ..., "to_q", "kernel").
      ndim: number of axes. Kernels are [..., in, out].
    """
    layer, leaf = ("", *path)[-2:]
    if _STACKED in path:
        return (None, *logical_axes((layer, leaf), ndim - 1))
    if ndim < 2:
        return (None,) * ndim  # Norms and biases need little memory.
    before = (None,) * (ndim - 2)
    if leaf == "lora_a":
        return (*before, "hidden" if layer in _ROW_PARALLEL else "width", None)
    if leaf == "lora_b":
        return (*before, None, "hidden" if layer in _COLUMN_PARALLEL else "width")
    if leaf != "kernel":
        return (*before, None, "width")  # Embedding tables, learned tokens.
    if layer in _COLUMN_PARALLEL:
        return (*before, "width", "hidden")
    if layer in _ROW_PARALLEL:
        return (*before, "hidden", "width")
    return (*before, None, "width")


def parameter_spec(path: Path, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of a parameter.

    If a mesh axis does not divide the parameter's axis, it shards another axis of the parameter
    that it divides, if there is one, or else none.

    Args:
      path: see `logical_axes`.
      shape: shape of the parameter.
      mesh: mesh with the axes of `RULES`.
    """
    spec: list[tuple[str, ...] | None] = [None] * len(shape)
    first = int(_STACKED in path)
    for position, name in enumerate(logical_axes(path, len(shape))):
        axis = None if name is None else RULES[name]
        if axis is None or mesh.shape[axis] == 1:
            continue
        others = [i for i in reversed(range(first, len(shape))) if i != position]
        for candidate in (position, *others):
            taken = spec[candidate] or ()
            shards = mesh.shape[axis] * math.prod(mesh.shape[a] for a in taken)
            if shape[candidate] % shards == 0 and (candidate == position or not taken):
                spec[candidate] = (*taken, axis)
                break
    return PartitionSpec(*spec)


def parameter_sharding(path: Path, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns the NamedSharding of a parameter; see `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(path, shape, mesh))


def tree_shardings(tree: Params, mesh: Mesh) -> dict[str, Any]:
    """Returns a tree of shardings for a parameter tree with one root per part."""
    return unflatten(
        {path: parameter_sharding(path, leaf.shape, mesh) for path, leaf in flatten(tree).items()}
    )
