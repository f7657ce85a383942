"""Low-rank updates (LoRA) in the files of diffusers, PEFT and kohya, to and from our parameters.

For each updated layer a file has a matrix down [rank, in], a matrix up [out, rank], and optionally
a scalar alpha: W + (alpha / rank) up down. Alpha may also be in the file's header or in a file
beside it (`lora_strength`). The names of a layer, most frequent first:

    unet.mid_block.attentions.0...attn1.to_q.lora_A.weight         diffusers, PEFT
    lora_unet_middle_block_1_...attn1_to_q.lora_down.weight        kohya, with the original names
    lora_unet_mid_block_attentions_0_...attn1_to_q.lora_down.weight     kohya, diffusers' names
    unet.mid_block.attentions.0...attn1.processor.to_q_lora.down.weight     diffusers before 0.22

Without any alpha it is the rank. Files that we write have none, since readers look for it in
different places: the scale is multiplied into the up matrix.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from focusdpo_jax.checkpoints import (
    ip_adapter,
    lora_strength,
    original_names,
    pytorch_names,
    tensor_file,
)
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.parameters import Params, Path, flatten, unflatten
from focusdpo_jax.models.unet import UNetConfig

WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}
_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}


class LowRank(NamedTuple):
    """The update of one layer: its weight is W + scale * up down.

    Attributes:
      down: [rank, in], or [rank, in, h, w] for a convolution.
      up: [out, rank], or [out, rank, 1, 1] for a convolution.
      scale: alpha / rank or, for rsLoRA, alpha / sqrt(rank).
    """

    down: Float[np.ndarray, " rank *in_and_kernel"]
    up: Float[np.ndarray, " out_features rank *ones"]
    scale: float


def _modules(parameters: Params, unet_config: UNetConfig) -> dict[str, Path]:
    """Returns {name in a file: path} of every layer with a kernel, for all names it can have.

    Paths are those of `stacking.split`.
    """
    modules = {}
    for path in flatten(stacking.split(parameters)):
        if path[-1] != "kernel":
            continue
        part = path[0]
        name = pytorch_names.torch_name(path[1:]).removesuffix(".weight")
        names = [name]
        if part == "unet":
            if ip_adapter.is_image_branch(path):
                continue
            names.append(original_names.unet_module(name, unet_config))
        else:
            names.append(name.removeprefix("text_model."))  # As in modules of transformers 5.
        for each in names:
            modules[f"{part}.{each}"] = path
            for prefix in _KOHYA[part]:
                modules[prefix + each.replace(".", "_")] = path
    return modules


def _split(name: str) -> tuple[str, str | None]:
    """Splits a tensor's name into its layer and "down", "up" or "alpha"; None for other tensors."""
    end = next((end for end in _ENDS if name.endswith(end)), None)
    if end is None:
        return name, None
    layer = name.removesuffix(end).removeprefix(_PEFT_PREFIX)
    if end.startswith("_"):
        layer = re.sub(r"to_out$", "to_out.0", layer.replace(".processor.", "."))
    return layer, _ENDS[end]


def load(path: epath.PathLike, parameters: Params, unet_config: UNetConfig) -> dict[Path, LowRank]:
    """Loads the updates of a file or folder, with the scale that its metadata define.

    Args:
      path: a safetensors file, or a folder with pytorch_lora_weights.safetensors (diffusers) or
        adapter_model.safetensors and adapter_config.json (PEFT).
      parameters, unet_config: see `read`.

    Returns:
      {path of a kernel in `stacking.split(parameters)`: LowRank}.

    Raises:
      UserError: the file is missing or damaged; or see `read`.
    """
    path = epath.Path(path)
    if path.is_dir():
        found = [name for name in (WEIGHTS, _PEFT_WEIGHTS) if (path / name).exists()]
        if len(found) != 1:
            raise UserError(
                f"{path} has {' and '.join(found) or f'neither {WEIGHTS} nor {_PEFT_WEIGHTS}'}"
                ": give the file to read."
            )
        path = path / found[0]
    tensors, metadata = tensor_file.read(path)
    adapter = None
    if (
        any(name.startswith(_PEFT_PREFIX) for name in tensors)
        and lora_strength.HEADER not in metadata
    ):
        adapter = lora_strength.of_folder(path.parent)
    return read(tensors, parameters, unet_config, str(path), metadata=metadata, adapter=adapter)


def read(
    tensors: Mapping[str, Any],
    parameters: Params,
    unet_config: UNetConfig,
    source: str = "LoRA file",
    *,
    metadata: Mapping[str, str] | None = None,
    adapter: lora_strength.AdapterConfig | None = None,
) -> dict[Path, LowRank]:
    """Finds the updates in the tensors of a file.

    Args:
      tensors, metadata: results of `tensor_file.read`: {name: array}, and the texts of the header,
        which may have alpha. Otherwise alpha is that of the `.alpha` tensors, or the rank.
      parameters: {part: tree}, arrays or shapes, of the parts that may be updated: "unet" and
        the text encoders.
      unet_config: sizes of the UNet.
      source: name of the file for messages.
      adapter: the configuration beside a PEFT file, or None.

    Returns:
      {path of a kernel in `stacking.split(parameters)`: LowRank}.

    Raises:
      UserError: tensors are unexpected, of another shape, or lack their other matrix (it names all
        of them); or the metadata are damaged, contradict the tensors, or describe more than
        low-rank updates.
    """
    configs = lora_strength.of_header(metadata or {}, tuple(_KOHYA), source)
    if adapter is not None:
        configs = dict.fromkeys(_KOHYA, adapter)
    kohya = lora_strength.kohya_alpha(metadata or {}, source)
    modules = _modules(
        {part: tree for part, tree in parameters.items() if part in _KOHYA}, unet_config
    )
    shapes = flatten(stacking.split(parameters))
    pieces, layers, unexpected = {}, {}, []
    for name in sorted(tensors):
        layer, kind = _split(name)
        path = modules.get(layer, modules.get(f"unet.{layer}"))
        if kind is None or path is None:
            unexpected.append(name)
        else:
            pieces.setdefault(path, {})[kind] = name
            layers[path] = layer
    halves, missing, misshaped = {}, [], []
    for path, names in pieces.items():
        if not {"down", "up"} <= names.keys():
            missing.append(f"the other half of {next(iter(names.values()))}")
            continue
        down, up = (np.asarray(tensors[names[kind]]) for kind in ("down", "up"))
        rank, kernel = down.shape[0], shapes[path].shape
        wanted = ((rank, kernel[-2], *kernel[:-2]), (kernel[-1], rank, *(1 for _ in kernel[:-2])))
        if (down.shape, up.shape) != wanted:
            misshaped.append(
                f"{names['down']} and {names['up']} are {down.shape} and {up.shape}, "
                f"not {wanted[0]} and {wanted[1]}"
            )
            continue
        halves[path] = down, up
    pytorch_names.require_fit(
        source, {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    )
    alphas = {
        path: np.asarray(tensors[names["alpha"]]).item()
        for path, names in pieces.items()
        if "alpha" in names
    }
    return {
        path: LowRank(
            down, up, _scale(path, layers[path], down.shape[0], alphas, configs, kohya, source)
        )
        for path, (down, up) in halves.items()
    }


def _scale(
    path: Path,
    layer: str,
    rank: int,
    alphas: Mapping[Path, float],
    configs: Mapping[str, lora_strength.AdapterConfig],
    kohya: float | None,
    source: str,
) -> float:
    """Returns the scale of one layer's update.

    Args:
      path: path of the kernel; its first key is the part.
      layer: name in the file.
      rank: rank of the matrices.
      alphas: {path: alpha} of the layers with an alpha tensor.
      configs: {part: configuration} from the metadata.
      kohya: `ss_network_alpha` of the header, or None.
      source: name of the file for messages.
    """
    part, config = path[0], configs.get(path[0])
    stated = None
    if config is not None:
        # The text encoders' names depend on the version of transformers, so that the file's are
        # used.
        own = (
            layer.removeprefix(f"{part}.")
            if part != "unet" and "." in layer
            else (pytorch_names.torch_name(path[1:]).removesuffix(".weight"))
        )
        stated = config.scale(own, rank)
    if path in alphas:
        scale = alphas[path] / rank
        if not math.isfinite(scale):
            raise UserError(
                f"{source}: the alpha of {layer} is {alphas[path]}, which is not a finite number"
            )
        if (
            config is not None
            and stated is not None
            and not math.isclose(scale, stated, rel_tol=1e-3)
        ):
            raise UserError(
                f"{source}: {layer} has a tensor alpha = {alphas[path]:g}, a scale of "
                f"{scale:g}, and {config.source} has {stated:g}: remove one of them"
            )
        return scale
    if stated is not None:
        return stated
    if configs:
        raise UserError(
            f"{source}: its {lora_strength.HEADER} has no fields for {part}, so that the scale "
            f"of {layer} is unknown: save it again with the metadata of all parts that it updates"
        )
    others = {alpha for other, alpha in alphas.items() if other[0] == part}
    if others - {rank}:
        raise UserError(
            f"{source}: {layer} has no alpha, unlike other layers of {part}: kohya's scripts "
            f"use its rank {rank}, diffusers the alpha of most layers. Add the tensor"
        )
    if kohya not in (None, rank):
        raise UserError(
            f"{source}: ss_network_alpha = {kohya:g} in its header, but {layer}, of rank {rank}, "
            "has no tensor alpha, without which kohya's scripts and diffusers use the rank. Add "
            "the tensors or, if the scale is multiplied into the matrices, remove the field"
        )
    return 1.0


def to_flax(
    updates: Mapping[Path, LowRank],
    template: Params,
    config: UNetConfig,
    source: str = "LoRA file",
) -> dict[str, Any]:
    """Converts the updates of a file to trainable leaves of the UNet.

    Smaller ranks are padded with zeros; layers without an update are zero.

    Args:
      updates: result of `read`.
      template: the UNet's tree, of arrays or shapes, with its `lora_a` and `lora_b`.
      config: sizes of the UNet.
      source: name of the file for messages.

    Returns:
      A tree of the `lora_a` and `lora_b` of `template`, float32.

    Raises:
      UserError: an update is of a layer without `lora_a`, or its rank is larger than the UNet's.
    """
    shapes = flatten(stacking.split(template))
    places = {path[:-1]: leaf.shape for path, leaf in shapes.items() if path[-1] == "lora_a"}
    ours = {path[1:-1]: update for path, update in updates.items() if path[0] == "unet"}
    lost = [
        ".".join(path[:-1]) for path in updates if path[0] != "unet" or path[1:-1] not in places
    ]
    if lost:
        raise UserError(
            f"{source} updates {len(lost)} layers that have no trainable update here, "
            f"such as {lost[0]}; merge it into the base instead (lora.merge)"
        )
    rank = max((update.down.shape[0] for update in ours.values()), default=0)
    if rank > config.lora_rank:
        raise UserError(
            f"{source} has rank {rank}; set config.model.lora_rank = {rank}, "
            f"which is {config.lora_rank}"
        )
    flat = {}
    for path, (width, rank) in places.items():
        update, features = ours.get(path), shapes[*path, "lora_b"].shape[1]
        down, up = np.zeros((width, rank), np.float32), np.zeros((rank, features), np.float32)
        if update is not None:
            size = update.down.shape[0]
            down[:, :size] = np.asarray(update.down, np.float32).T
            up[:size] = np.asarray(update.up, np.float32).T
            up *= np.float32(update.scale / (config.lora_alpha / config.lora_rank))
        flat[*path, "lora_a"], flat[*path, "lora_b"] = down, up
    return stacking.join(flat, template)


def merge(
    updates: Mapping[Path, LowRank], parameters: Params, strength: float = 1.0
) -> dict[str, Any]:
    """Adds updates to their kernels.

    Args:
      updates: result of `read`.
      parameters: {part: tree} of arrays.
      strength: factor of every update.

    Returns:
      `parameters` with the new kernels, in the same types.
    """
    flat = flatten(stacking.split(parameters))
    for path, (down, up, scale) in updates.items():
        down, up = np.asarray(down, np.float32), np.asarray(up, np.float32)
        product = np.tensordot(up.reshape(up.shape[:2]), down, axes=1)
        kernel = np.asarray(flat[path])
        # From PyTorch's [out, in(, h, w)] to our [(h, w,) in, out].
        product = np.moveaxis(product, (0, 1), (-1, -2))
        flat[path] = (kernel + strength * scale * product).astype(kernel.dtype)
    return stacking.join(flat, parameters)


def from_flax(unet_parameters: Params, config: UNetConfig) -> dict[str, np.ndarray]:
    """Converts the UNet's low-rank updates to a file for `pipe.load_lora_weights`.

    Args:
      unet_parameters: the UNet's tree; leaves other than `lora_a` and `lora_b` are ignored.
      config: sizes of the UNet.

    Returns:
      dict from name to float32 array. The scale alpha / rank is multiplied into `lora_B`, which is
      exact if it is a power of two.

    Raises:
      UserError: the tree has no low-rank updates.
    """
    flat = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in flatten(unet_parameters).items()
        if path[-1] in ("lora_a", "lora_b")
    }
    if not flat:
        raise UserError("the model has no low-rank updates to write")
    scale = np.float32(config.lora_alpha / config.lora_rank)
    flat = {path: leaf * scale if path[-1] == "lora_b" else leaf for path, leaf in flat.items()}
    tensors = pytorch_names.from_flax(unflatten(flat))
    return {f"unet.{name}": value for name, value in tensors.items()}


def save(folder: epath.PathLike, unet_parameters: Params, config: UNetConfig) -> None:
    """Writes `pytorch_lora_weights.safetensors`; see `from_flax`."""
    tensor_file.write(epath.Path(folder) / WEIGHTS, from_flax(unet_parameters, config))
