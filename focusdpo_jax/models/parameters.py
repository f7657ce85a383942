"""Parameter trees: their types, and the split into trainable and frozen leaves.

The parameters of a generator are nested dicts with one root per part
(`generator_config.PARTS`), such as `{"unet": {"conv_in": {"kernel": ...}}, "vae": ...}`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util

from focusdpo_jax.errors import UserError

# Nested dicts with string keys; the leaves are arrays or `jax.ShapeDtypeStruct`s.
Params = Mapping[str, Any]
# Keys from the root of a tree to a leaf, such as ("unet", "conv_in", "kernel").
Path = tuple[str, ...]

# Values of `config.trainable`, each with a predicate on the path of a parameter.
TRAINABLE: dict[str, Callable[[Path], bool]] = {
    # The subject adapter: its resampler and the image keys and values inside the UNet.
    "adapter": lambda path: path[0] == "adapter" or path[-2] in ("to_k_ip", "to_v_ip"),
    # Low-rank updates of the UNet's attention projections.
    "lora": lambda path: path[-1] in ("lora_a", "lora_b"),
    # UNet and subject adapter.
    "full": lambda path: path[0] in ("unet", "adapter"),
    # All parts with a gradient from the denoising loss, for pre-training from random weights.
    "generator": lambda path: path[0] in ("unet", "adapter", "text_encoder", "text_encoder_2"),
}


def flatten(tree: Params) -> dict[Path, Any]:
    """Returns {path: leaf} of nested dicts."""
    return traverse_util.flatten_dict(tree)  # pyright: ignore[reportReturnType]


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns the nested dicts of {path: leaf}; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat)


def split_parameters(parameters: Params, trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a parameter tree into trainable and frozen leaves.

    Args:
      parameters: {part: tree}.
      trainable: a key of `TRAINABLE`.

    Returns:
      (trainable, frozen): two nested dicts without a common leaf.

    Raises:
      UserError: the tree has no trainable leaf.
    """
    flat = flatten(parameters)
    chosen = {path for path in flat if TRAINABLE[trainable](path)}
    if not chosen:
        raise UserError(
            f"config.trainable = {trainable!r}: the model has no such parameters"
            + (" (set config.model.lora_rank, for example to 8)" if trainable == "lora" else "")
        )
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def merge_parameters(trainable: Params, frozen: Params) -> dict[str, Any]:
    """Merges the two trees of `split_parameters` into one."""
    return unflatten(flatten(frozen) | flatten(trainable))
