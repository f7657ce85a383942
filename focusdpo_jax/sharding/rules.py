"""Which axis of the mesh divides which axis of a parameter.

Every axis of a parameter has a logical name, which follows from the layer that the parameter
belongs to; `RULES` says which axis of the mesh divides it. Layers come in twos: the first spreads
its input over heads or hidden units, the second gathers them (Megatron-LM, arXiv 1909.08053), so
that `tensor` costs one sum of activations for both.
"""

import math

from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

RULES = {"width": "fsdp", "hidden": "tensor"}

# Layers of UNet, adapter, CLIP, DINO and autoencoder, by name.
_SPREADING = {
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
_GATHERING = {"to_out_0", "out_proj", "net_2", "fc2", "conv2"}
# Whose parameters have an axis over equal blocks before their own. A loop takes one block after the
# other, so that this axis is never divided.
_STACKED = "transformer_blocks"


def logical_axes(path, ndim):
    """The names of a parameter's axes, None for an axis that is never divided.

    Args:
      path: names from the part on, such as ("unet", "mid_block", ..., "to_q", "kernel").
      ndim: number of axes. Kernels are [..., in, out].
    """
    layer, leaf = ("", *path)[-2:]
    if _STACKED in path:
        return (None, *logical_axes((layer, leaf), ndim - 1))
    if ndim < 2:
        return (None,) * ndim  # Norms and biases take no room.
    before = (None,) * (ndim - 2)
    if leaf == "lora_a":
        return (*before, "hidden" if layer in _GATHERING else "width", None)
    if leaf == "lora_b":
        return (*before, None, "hidden" if layer in _SPREADING else "width")
    if leaf != "kernel":
        return (*before, None, "width")  # Tables of embeddings, learned tokens.
    if layer in _SPREADING:
        return (*before, "width", "hidden")
    if layer in _GATHERING:
        return (*before, "hidden", "width")
    return (*before, None, "width")


def parameter_spec(path, shape, mesh):
    """The PartitionSpec of a parameter.

    An axis that its share of the mesh does not divide equally moves its share to another axis that
    can take it, or else stays whole.
    """
    spec = [None] * len(shape)
    first = int(_STACKED in path)
    for position, name in enumerate(logical_axes(path, len(shape))):
        axis = RULES.get(name)
        if axis is None or mesh.shape[axis] == 1:
            continue
        others = [i for i in reversed(range(first, len(shape))) if i != position]
        for place in (position, *others):
            taken = spec[place] or ()
            share = mesh.shape[axis] * math.prod(mesh.shape[a] for a in taken)
            if shape[place] % share == 0 and (place == position or not taken):
                spec[place] = (*taken, axis)
                break
    return PartitionSpec(*spec)


def parameter_sharding(path, shape, mesh):
    """The NamedSharding of a parameter; see `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(path, shape, mesh))


def tree_shardings(tree, mesh):
    """The shardings of a tree of parameters whose paths begin with their part."""
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
        {path: parameter_sharding(path, leaf.shape, mesh) for path, leaf in flat.items()}
    )
