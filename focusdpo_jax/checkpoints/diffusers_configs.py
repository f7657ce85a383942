"""The config.json files of diffusers and transformers, to and from the configurations of our parts.

Values that our modules do not implement are rejected with the name of the field, so that a model of
another architecture never loads as if it were SDXL.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from etils import epath

from focusdpo_jax.diffusion.samplers import SPACINGS
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import read_json
from focusdpo_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from focusdpo_jax.models.generator_config import GeneratorConfig
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

# Fields with the one value that our modules implement. diffusers writes every field, but older
# files lack newer fields: those in _STATED are required, the others optional.
_UNET = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": False,
    "use_linear_projection": True,
}
_VAE = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_CLIP = {"layer_norm_eps": 1e-5, "num_channels": 3}
_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
# Fields that change the noise, the timesteps or the UNet's input, with the one implemented value.
_SAMPLING = {
    "clip_sample": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "sigma_max": None,
    "sigma_min": None,
    "thresholding": False,
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
}
# The same for the DPM-Solver classes.
_DPM_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lambda_min_clipped": -float("inf"),
}
# Scheduler classes with this noise schedule, and the default timestep spacing of each in diffusers.
# The class does not determine the sampler (`diffusion.samplers`).
SCHEDULERS = dict.fromkeys(
    (
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "PNDMScheduler",
    ),
    "leading",
) | dict.fromkeys(
    (
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "UniPCMultistepScheduler",
    ),
    "linspace",
)
# Scheduler classes whose clip_sample is True by default.
_CLIP_SAMPLES = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
_STATED = {
    "addition_embed_type",
    "use_linear_projection",
    "beta_end",
    "beta_schedule",
    "beta_start",
}
# transformers' defaults for fields that a file lacks; older files have only fields that differ.
_CLIP_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "projection_dim": 512,
}
_CLIP_VISION = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "projection_dim": 512,
}
# Our names of the fields of both encoders, and transformers'.
_TOWER = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation": "hidden_act",
}
_TEXT = _TOWER | {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "eos_token_id": "eos_token_id",
}
_VISION = _TOWER | {"image_size": "image_size", "patch_size": "patch_size"}


def read_file(folder: epath.PathLike, files: str) -> dict[str, Any]:
    """Reads the config.json of a folder.

    Args:
      folder: folder of the model.
      files: the files that such a folder has, for the message if config.json is missing.

    Raises:
      UserError: the file is missing or not a JSON object.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise UserError(
            f"{path} cannot be read (No such file or directory). Give a folder with {files}."
        )
    return read_json(path)


def _require(values: Mapping[str, Any], fixed: Mapping[str, Any], source: str) -> None:
    """Raises a UserError that names every field whose value our modules do not implement."""
    wrong = [
        f"{name} = {values.get(name)!r} (not {value!r})"
        for name, value in fixed.items()
        if (name in values or name in _STATED) and (values.get(name) or None) != (value or None)
    ]
    if wrong:
        raise UserError(
            f"{source} describes a model of another kind than SDXL's: " + ", ".join(wrong)
        )


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def read_unet(values: Mapping[str, Any], source: str) -> UNetConfig:
    """Converts the config.json of a `UNet2DConditionModel`.

    Args:
      values: values of the file.
      source: name of the file for messages.

    Raises:
      UserError: a field has a value that `UNet` does not implement.
    """
    _require(values, _UNET, source)
    down, up = values["down_block_types"], values["up_block_types"]
    levels = len(down)
    depths = _per_level(values.get("transformer_layers_per_block", 1), levels)
    widths = {*_per_level(values["layers_per_block"], levels)}
    known = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
    uneven = len(widths) > 1 or not all(isinstance(depth, int) for depth in depths)
    if [known.get(name) for name in down] != list(reversed(up)) or uneven:
        raise UserError(
            f"{source} describes a model of another kind than SDXL's: "
            f"down_block_types = {down}, up_block_types = {up}, "
            f"layers_per_block = {values['layers_per_block']}, "
            f"transformer_layers_per_block = {values.get('transformer_layers_per_block')}"
        )
    heads = values.get("num_attention_heads") or values["attention_head_dim"]
    time_embed_dim = values["addition_time_embed_dim"]
    return UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        block_out_channels=tuple(values["block_out_channels"]),
        transformer_layers_per_block=tuple(
            depth if name.startswith("CrossAttn") else 0 for name, depth in zip(down, depths)
        ),
        mid_transformer_layers=depths[-1],
        layers_per_block=widths.pop(),
        num_heads=_per_level(heads, levels),
        cross_attention_dim=values["cross_attention_dim"],
        addition_time_embed_dim=time_embed_dim,
        pooled_dim=values["projection_class_embeddings_input_dim"] - 6 * time_embed_dim,
        norm_groups=values["norm_num_groups"],
    )


def write_unet(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """Returns the config.json of a `UNet2DConditionModel` with a UNet's parameters.

    The image branch is not part of it: diffusers adds it when it loads an IP-Adapter.

    Args:
      config: sizes of the UNet.
      sample_size: side of the latents that pipelines generate by default.

    Raises:
      UserError: diffusers does not support these sizes.
    """
    depths, mid = config.transformer_layers_per_block, config.mid_transformer_layers
    if not mid or depths[-1] not in (0, mid):
        raise UserError(
            f"mid_transformer_layers = {mid}: diffusers supports only UNets whose middle block has "
            f"as many transformer blocks as their last level, and one or more; this one's "
            f"transformer_layers_per_block = {depths}"
        )
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        **_UNET,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": list(config.block_out_channels),
        "transformer_layers_per_block": [max(depth, 1) for depth in depths[:-1]] + [mid],
        "layers_per_block": config.layers_per_block,
        "num_attention_heads": None,
        "attention_head_dim": list(config.num_heads),
        "cross_attention_dim": config.cross_attention_dim,
        "addition_time_embed_dim": config.addition_time_embed_dim,
        "projection_class_embeddings_input_dim": (
            config.pooled_dim + 6 * config.addition_time_embed_dim
        ),
        "norm_num_groups": config.norm_groups,
    }


def read_vae(values: Mapping[str, Any], source: str) -> VAEConfig:
    """Converts the config.json of an `AutoencoderKL`; see `read_unet` for the arguments.

    Raises:
      UserError: a field has a value that `VAE` does not implement.
    """
    _require(values, _VAE | {"out_channels": values["in_channels"]}, source)
    return VAEConfig(
        in_channels=values["in_channels"],
        block_out_channels=tuple(values["block_out_channels"]),
        layers_per_block=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        norm_groups=values["norm_num_groups"],
        mid_attention=values.get("mid_block_add_attention", True),
        scaling_factor=values["scaling_factor"],
    )


def write_vae(config: VAEConfig, sample_size: int) -> dict[str, Any]:
    """Returns the config.json of an `AutoencoderKL` with a VAE's parameters.

    Args:
      config: sizes of the VAE.
      sample_size: side of the images in pixels.
    """
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **_VAE,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": config.scaling_factor,
        "sample_size": sample_size,
        # SDXL's published weights overflow in float16; diffusers then decodes in float32.
        "force_upcast": True,
    }


_Encoder = TypeVar("_Encoder", CLIPTextConfig, CLIPVisionConfig)


def _read_encoder(
    kind: type[_Encoder],
    names: Mapping[str, str],
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    source: str,
) -> _Encoder:
    _require(values, _CLIP, source)
    values = {**defaults, **values}
    projected = any(name.endswith("WithProjection") for name in values.get("architectures") or ())
    return kind(
        **{ours: values[theirs] for ours, theirs in names.items()},
        projection_dim=values["projection_dim"] if projected else None,
    )


def read_clip_text(values: Mapping[str, Any], source: str) -> CLIPTextConfig:
    """Converts the config.json of transformers' `CLIPTextModel[WithProjection]`.

    See `read_unet` for the arguments and errors.
    """
    return _read_encoder(CLIPTextConfig, _TEXT, values, _CLIP_TEXT, source)


def read_clip_vision(values: Mapping[str, Any], source: str) -> CLIPVisionConfig:
    """Converts the config.json of transformers' `CLIPVisionModel[WithProjection]`.

    See `read_unet` for the arguments and errors.
    """
    return _read_encoder(CLIPVisionConfig, _VISION, values, _CLIP_VISION, source)


def _write_encoder(
    model: str, kind: str, config: CLIPTextConfig | CLIPVisionConfig, names: Mapping[str, str]
) -> dict[str, Any]:
    projection = config.projection_dim
    return {
        "architectures": [model + ("WithProjection" if projection else "")],
        "model_type": kind,
        "layer_norm_eps": 1e-5,
        **({"projection_dim": projection} if projection else {}),
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
    }


def write_clip_text(config: CLIPTextConfig) -> dict[str, Any]:
    """Returns the config.json of a `CLIPTextModel[WithProjection]` with our parameters."""
    ends = {"bos_token_id": config.vocab_size - 2, "pad_token_id": 1}
    return _write_encoder("CLIPTextModel", "clip_text_model", config, _TEXT) | ends


def write_clip_vision(config: CLIPVisionConfig) -> dict[str, Any]:
    """Returns the config.json of a `CLIPVisionModel[WithProjection]` with our parameters."""
    return _write_encoder("CLIPVisionModel", "clip_vision_model", config, _VISION) | {
        "num_channels": 3
    }


def read_scheduler(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Converts a scheduler_config.json to fields of `GeneratorConfig` about noise and timesteps.

    Fields that the file lacks have the defaults of its class in diffusers, as in a pipeline. See
    `read_unet` for the arguments.

    Raises:
      UserError: the noise schedule is not SDXL's, or a field has a value that is not implemented.
    """
    kind = values.get("_class_name", "DDIMScheduler")
    if kind not in SCHEDULERS:
        raise UserError(
            f"{source} has _class_name = {kind!r}, which is not supported; supported are "
            f"{', '.join(sorted(SCHEDULERS))}"
        )
    _require(values, _SCHEDULER, source)
    fixed = _SAMPLING | (_DPM_SOLVER if kind.startswith("DPMSolver") else {})
    wrong = [
        f"{name} = {values[name]!r} (only {value!r})"
        for name, value in fixed.items()
        if (values.get(name) or None) not in (None, value)
    ]
    if values.get("_class_name") in _CLIP_SAMPLES and "clip_sample" not in values:
        wrong.append(f"clip_sample = True, the default of {kind} (only False)")
    prediction_type = values.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        wrong.append(f"prediction_type = {prediction_type!r} (only 'epsilon' or 'v_prediction')")
    offset, spacing = (
        values.get("steps_offset", 0),
        values.get("timestep_spacing", SCHEDULERS[kind]),
    )
    if not isinstance(offset, int) or offset < 0:
        wrong.append(f"steps_offset = {offset!r} (a whole number >= 0)")
    if spacing not in SPACINGS:
        wrong.append(f"timestep_spacing = {spacing!r} (only {', '.join(map(repr, SPACINGS))})")
    zero_snr = bool(values.get("rescale_betas_zero_snr", False))
    if zero_snr and prediction_type == "epsilon":
        wrong.append("rescale_betas_zero_snr = True (only with prediction_type = 'v_prediction')")
    if wrong:
        raise UserError(
            f"{source} has values that are not implemented: {', '.join(wrong)}. If the "
            "model was not trained with them, set them to the implemented ones"
        )
    # None is the default of GeneratorConfig, which depends on the terminal signal-to-noise ratio.
    default = "trailing" if zero_snr else "leading"
    return {
        "prediction_type": prediction_type,
        "zero_terminal_snr": zero_snr,
        "timestep_spacing": None if spacing == default else spacing,
        "steps_offset": offset,
        "set_alpha_to_one": bool(values.get("set_alpha_to_one", True)),
    }


def write_scheduler(config: GeneratorConfig) -> dict[str, Any]:
    """Returns the scheduler_config.json of DDIM, this package's default sampler."""
    spacing = config.spacing
    return {
        "_class_name": "DDIMScheduler",
        **_SCHEDULER,
        "clip_sample": False,
        "set_alpha_to_one": spacing.set_alpha_to_one,
        "steps_offset": spacing.steps_offset,
        "thresholding": False,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": spacing.name,
    }
