"""Reads an SDXL model from one safetensors file in the original layout (see original_names).

Such a file does not state its sizes: they are those of SDXL base 1.0, and a file of other sizes is
rejected because its tensors do not fit. The image encoder and the vocabulary, which it lacks, are
in folders in the layout of a diffusers pipeline.

The prediction type of the UNet can be given in two ways: in the metadata by
modelspec.prediction_type, "v" or "epsilon" (ModelSpec, github.com/Stability-AI/ModelSpec), and by
empty tensors named v_pred and, for zero terminal SNR, ztsnr (NoobAI; ComfyUI and
stable-diffusion-webui read them, too).
"""

from typing import Any

from absl import logging
from etils import epath

from focusdpo_jax.checkpoints import (
    diffusers_folder,
    ip_adapter,
    original_names,
    pytorch_names,
    tensor_file,
)
from focusdpo_jax.errors import MissingFiles, UserError
from focusdpo_jax.models.clip import CLIPTextConfig
from focusdpo_jax.models.generator_config import GeneratorConfig
from focusdpo_jax.models.parameters import Params, Path
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

# Configurations of the parts in a file.
SDXL: dict[str, Any] = {
    "unet": UNetConfig(image_context=True),
    "vae": VAEConfig(),
    "text_encoder": CLIPTextConfig(),
    "text_encoder_2": CLIPTextConfig(
        hidden_size=1280,
        num_layers=32,
        num_heads=20,
        intermediate_size=5120,
        activation="gelu",
        projection_dim=1280,
    ),
}


PREDICTION_TYPES = ("epsilon", "v_prediction", "v_prediction_zero_snr")
"""Values of config.model.prediction_type that override the file's."""


def load_config(
    path: epath.PathLike,
    *,
    image_encoder: epath.PathLike | None = None,
    tokenizer: epath.PathLike | None = None,
    adapter: epath.Path | None = None,
    prediction_type: str = "",
) -> GeneratorConfig:
    """Returns the configuration of a file with the other parts.

    Args:
      path: the file.
      image_encoder: folder of transformers' image encoder.
      tokenizer: folder of the tokenizer's files (see `vocabulary`).
      adapter: an IP-Adapter file; None for a new adapter.
      prediction_type: one of PREDICTION_TYPES; "" for that of the file.

    Raises:
      UserError: a file is missing or damaged, or the parts do not fit each other.
    """
    path = epath.Path(path)
    tensor_file.read(path)  # A file of another format is the first error to report.
    if image_encoder is None or tokenizer is None:
        missing = [
            f"config.model.{field}"
            for field, folder in (("image_encoder", image_encoder), ("tokenizer", tokenizer))
            if folder is None
        ]
        raise MissingFiles(
            f"{path} is a single file, which has neither image encoder nor tokenizer: "
            f"give {' and '.join(missing)}. {diffusers_folder.FETCH}"
        )
    missing = diffusers_folder.missing_files(
        {"image_encoder": epath.Path(image_encoder)}, epath.Path(tokenizer)
    )
    if missing:
        raise MissingFiles(f"{path} needs {', '.join(missing)}. {diffusers_folder.FETCH}")
    parts = SDXL | {
        "image_encoder": diffusers_folder.read_part_config(
            epath.Path(image_encoder), "image_encoder"
        )
    }
    noise = prediction(prediction_type) if prediction_type else _prediction_of(path)
    # The values of the scheduler_config.json that is published with SDXL.
    return diffusers_folder.generator_config(
        parts, adapter, image_encoder, zero_empty_prompt=True, set_alpha_to_one=False, **noise
    )


def prediction(name: str) -> dict[str, Any]:
    """Converts one of PREDICTION_TYPES to fields of `GeneratorConfig`."""
    return {
        "prediction_type": name.removesuffix("_zero_snr"),
        "zero_terminal_snr": name.endswith("_zero_snr"),
    }


def _prediction_of(path: epath.Path) -> dict[str, Any]:
    """Returns the prediction type of a file as fields of `GeneratorConfig`; epsilon by default."""
    tensors, metadata = tensor_file.read(path)
    v_pred, zero_snr = (name in tensors for name in original_names.MARKERS)
    stated = metadata.get("modelspec.prediction_type", "")
    known = {
        "": "epsilon",
        "epsilon": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
    }
    cure = f"Set config.model.prediction_type to one of {', '.join(PREDICTION_TYPES)}."
    if stated not in known:
        raise UserError(
            f"{path} has modelspec.prediction_type = {stated!r} in its metadata; known "
            f"are 'epsilon' and 'v'. {cure}"
        )
    if v_pred and stated == "epsilon":
        logging.warning(
            "%s has a tensor v_pred but prediction type epsilon in its metadata; read as v", path
        )
    kind = "v_prediction" if v_pred else known[stated]
    if zero_snr and kind == "epsilon":
        raise UserError(
            f"{path} has a tensor ztsnr, for noise of zero terminal SNR, but neither "
            f"v_pred nor modelspec.prediction_type = 'v', which it requires. "
            f"{cure}"
        )
    return {"prediction_type": kind, "zero_terminal_snr": zero_snr}


def open_part(
    path: epath.PathLike,
    part: str,
    example: Params,
    config: Any,
    *,
    adapter: epath.PathLike | None = None,
    image_encoder: epath.PathLike | None = None,
) -> dict[Path, tensor_file.LazyTensor] | None:
    """Finds the tensors of one part and checks their names and shapes; only headers are read.

    Args:
      path: the file.
      part: one of `generator.PARTS`.
      example: the expected tree of arrays or `jax.ShapeDtypeStruct`s, without "params".
      config: the part's configuration, SDXL[part] for a published file.
      adapter: path of an IP-Adapter file with the UNet's image branch; without one the branch is
        initialised as a copy of the text projections.
      image_encoder: folder of the image encoder; required for the part of this name.

    Returns:
      {path in `stacking.split(example)`: LazyTensor}, for `tensor_file.load`; None for "adapter"
      without such a file.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; it names all of them, missing
        ones by diffusers' names.
    """
    if part == "adapter":
        return None if adapter is None else diffusers_folder.open_adapter(adapter, example)
    if part == "image_encoder":
        assert image_encoder is not None
        tensors = diffusers_folder.read_tensors(image_encoder, part)
        return pytorch_names.fit(tensors, example, str(image_encoder))
    tensors, _ = tensor_file.read(path)
    pytorch_names.require_fit(str(path), {"unexpected": original_names.unknown_names(tensors)})
    found = original_names.to_diffusers(tensors, pytorch_names.names(example), part, config)
    if part == "unet" and adapter is not None:
        projections, _ = tensor_file.read(adapter)
        found |= ip_adapter.to_diffusers(projections, example, str(adapter))[0]
    elif part == "unet":
        found |= ip_adapter.init_image_branch(found, example)
    return pytorch_names.fit(found, example, f"{path}, {part},")


def load_part(
    path: epath.PathLike,
    part: str,
    example: Params,
    config: Any,
    *,
    dtype: Any = None,
    sharding: Any = None,
    **files: Any,
) -> dict[str, Any] | None:
    """Reads one part, tensor by tensor.

    Args:
      path, part, example, config, files: see `open_part`.
      dtype, sharding: see `tensor_file.placement`.

    Returns:
      A tree like `example`; None for "adapter" without such a file.

    Raises:
      UserError: see `open_part`.
    """
    return tensor_file.load(
        open_part(path, part, example, config, **files), example, dtype, sharding
    )
