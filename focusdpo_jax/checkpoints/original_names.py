"""Maps diffusers' tensor names to those of Stability AI's SDXL files (the sgm code base).

One safetensors file has the whole generator: the UNet under `model.diffusion_model.`, the
autoencoder under `first_stage_model.`, and the text encoders under `conditioner.embedders.0.` and
`.1.`, the second in OpenCLIP's layout. kohya's LoRA files use the UNet's names, too.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from focusdpo_jax.checkpoints.tensor_file import LazyTensor
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
MARKERS = ("v_pred", "ztsnr")
"""Empty tensors that mark a file's prediction type and noise schedule (see single_file)."""
# Tensors that are ignored: buffers, and moving averages of training.
_IGNORED = re.compile(
    rf"model_ema\.|denoiser\.|.*\.(position_ids|logit_scale)$|({'|'.join(MARKERS)})$"
)

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.?(.*)$")


def unet_module(name: str, config: UNetConfig) -> str:
    """Returns the original name of a UNet's module, without the prefix.

    Args:
      name: diffusers' name, such as "down_blocks.1.attentions.0.proj_in".
      config: configuration of the UNet; its levels and depths determine the numbers of the blocks.
    """
    if name in _UNET_ENDS:
        return _UNET_ENDS[name]
    match = _BLOCK.match(name)
    assert match is not None, name
    stage, block, kind, index, rest = match.groups()
    index, blocks_per_level = int(index), config.layers_per_block + 1
    if kind == "resnets":
        rest = _UNET_RESNET[rest]
    if stage == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    block, slot = int(block), int(kind == "attentions")
    if stage == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * blocks_per_level}.0.op"
        return f"input_blocks.{1 + block * blocks_per_level + index}.{slot}.{rest}"
    if kind == "upsamplers":
        index = config.layers_per_block
        slot = 1 + bool(config.transformer_layers_per_block[-1 - block])
    return f"output_blocks.{block * blocks_per_level + index}.{slot}.{rest}"


def _vae_module(name: str, config: VAEConfig) -> str:
    """Returns the original name of a module of the autoencoder, without the prefix."""
    half, _, inner = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return name
    match = _BLOCK.match(inner)
    if not match:
        return f"{half}.{inner.replace('conv_norm_out', 'norm_out')}"
    stage, block, kind, index, rest = match.groups()
    if stage == "mid_block" and kind == "attentions":
        return f"{half}.mid.attn_1.{_VAE_ATTENTION[rest]}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if stage == "mid_block":
        return f"{half}.mid.block_{int(index) + 1}.{rest}"
    if stage == "up_blocks":
        block = len(config.block_out_channels) - 1 - int(block)
    way = stage.removesuffix("_blocks")
    inner = f"block.{index}" if kind == "resnets" else f"{way}sample"
    return f"{half}.{way}.{block}.{inner}.{rest}"


def _squeeze_1x1(kernel: np.ndarray) -> np.ndarray:
    """Converts the kernel of a 1 x 1 convolution, which older attention code uses, to a matrix."""
    return kernel[:, :, 0, 0]


def original_tensor(
    part: str, name: str, config: Any
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Finds the original tensor of a tensor in diffusers.

    Args:
      part: a key of PREFIXES.
      name: name of the tensor in diffusers.
      config: the part's configuration.

    Returns:
      The original name with its prefix, and the function from the original array to diffusers'.
    """
    prefix, (module, _, leaf) = PREFIXES[part], name.rpartition(".")
    if part == "unet":
        return f"{prefix}{unet_module(module, config)}.{leaf}", _same
    if part == "vae":
        dense = re.search(r"attentions\.0\.to_.*\.weight$", name)
        return f"{prefix}{_vae_module(module, config)}.{leaf}", _squeeze_1x1 if dense else _same
    if part == "text_encoder":
        return prefix + name, _same
    if name == "text_projection.weight":
        return prefix + "text_projection", np.transpose
    name = name.removeprefix("text_model.")
    if name in _OPEN_CLIP:
        return prefix + _OPEN_CLIP[name], _same
    _, _, number, inner = module.removeprefix("text_model.").split(".", 3)
    layer = f"{prefix}transformer.resblocks.{number}"
    projection = re.match(r"self_attn\.([qkv])_proj$", inner)
    if projection:
        third = "qkv".index(projection[1])
        return f"{layer}.attn.in_proj_{leaf}", lambda whole: np.split(whole, 3)[third]
    return f"{layer}.{_OPEN_CLIP_LAYER[inner]}.{leaf}", _same


def _same(array: np.ndarray) -> np.ndarray:
    return array


def to_diffusers(
    tensors: Mapping[str, LazyTensor], names: Iterable[str], part: str, config: Any
) -> dict[str, LazyTensor]:
    """Renames the tensors of one part of an original file to diffusers' names.

    Args:
      tensors: dict from original name to `LazyTensor`.
      names: the part's names in diffusers.
      part: a key of PREFIXES.
      config: the part's configuration.

    Returns:
      dict from diffusers' name to `LazyTensor`. Unexpected tensors keep their names and missing
      ones are left out; `pytorch_names.to_flax` reports both.
    """
    found, used = {}, set()
    for name in names:
        theirs, change = original_tensor(part, name, config)
        if theirs in tensors:
            used.add(theirs)
            try:
                found[name] = tensors[theirs] if change is _same else tensors[theirs].map(change)
            except (IndexError, ValueError) as error:
                raise UserError(
                    f"{theirs} has the shape {tensors[theirs].shape}, which cannot become {name}"
                ) from error
    left = {
        name: value
        for name, value in tensors.items()
        if name not in used and name.startswith(PREFIXES[part]) and not _IGNORED.match(name)
    }
    return found | left


def unknown_names(tensors: Iterable[str]) -> list[str]:
    """Returns the names in a file that belong to no part of an original SDXL file."""
    return sorted(
        name
        for name in tensors
        if not name.startswith(tuple(PREFIXES.values())) and not _IGNORED.match(name)
    )
