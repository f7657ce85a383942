"""Names of Stability AI's own SDXL files (the sgm code base), from those of diffusers.

One safetensors file holds the whole generator: the UNet under `model.diffusion_model.`, the
autoencoder under `first_stage_model.`, the text encoders under `conditioner.embedders.0.` and
`.1.`, the second one as OpenCLIP lays it out. kohya's LoRA files use the UNet's names, too.
"""

import re

import numpy as np

from focusdpo_jax.errors import UserError

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
MARKERS = ("v_pred", "ztsnr")
"""Empty tensors that mark the prediction type and the noise schedule of a file (see single_file)."""
# Of a file's other tensors: buffers, moving averages kept for training.
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


def unet_module(name, config):
    """The original name of a UNet's module, without the prefix.

    Args:
      name: as in diffusers, for example "down_blocks.1.attentions.0.proj_in".
      config: the `UNetConfig`, whose levels and depths number the blocks.
    """
    if name in _UNET_ENDS:
        return _UNET_ENDS[name]
    stage, block, kind, index, rest = _BLOCK.match(name).groups()
    index, a_level = int(index), config.layers_per_block + 1
    if kind == "resnets":
        rest = _UNET_RESNET[rest]
    if stage == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    block, slot = int(block), int(kind == "attentions")
    if stage == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * a_level}.0.op"
        return f"input_blocks.{1 + block * a_level + index}.{slot}.{rest}"
    if kind == "upsamplers":
        index = config.layers_per_block
        slot = 1 + bool(config.transformer_layers_per_block[-1 - block])
    return f"output_blocks.{block * a_level + index}.{slot}.{rest}"


def _vae_module(name, config):
    """The original name of a module of the autoencoder, without the prefix."""
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


def _pixelwise(kernel):
    """A dense kernel from that of a 1 x 1 convolution, which older code attends with."""
    return kernel[:, :, 0, 0]


def original(part, name, config):
    """Where the tensor `name` of diffusers comes from.

    Args:
      part: a key of PREFIXES.
      config: the part's configuration.

    Returns:
      The original name with its prefix, and the function from the original array to diffusers'.
    """
    prefix, (module, _, leaf) = PREFIXES[part], name.rpartition(".")
    if part == "unet":
        return f"{prefix}{unet_module(module, config)}.{leaf}", _same
    if part == "vae":
        dense = re.search(r"attentions\.0\.to_.*\.weight$", name)
        return f"{prefix}{_vae_module(module, config)}.{leaf}", _pixelwise if dense else _same
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


def _same(array):
    return array


def to_diffusers(tensors, names, part, config):
    """The tensors of one part of an original file, under diffusers' names.

    Args:
      tensors: dict from original name to `tensor_file.LazyTensor`.
      names: the part's names in diffusers.
      part: a key of PREFIXES.
      config: the part's configuration.

    Returns:
      dict from diffusers' name to `LazyTensor`. A tensor without a place keeps its name, and one
      that is not in the file is left out, for `pytorch_names.to_flax` to complain about both.
    """
    found, used = {}, set()
    for name in names:
        theirs, change = original(part, name, config)
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


def foreign(tensors):
    """Names in a file that belong to no part of an original SDXL file."""
    return sorted(
        name
        for name in tensors
        if not name.startswith(tuple(PREFIXES.values())) and not _IGNORED.match(name)
    )
