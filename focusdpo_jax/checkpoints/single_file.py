"""An SDXL model in one safetensors file of the original layout (see original_names).

Such a file says nothing about sizes: they are those of SDXL base 1.0, and a file of other sizes
is refused by the tensors that do not fit. Image encoder and vocabulary, which it lacks, lie in
folders as a diffusers pipeline has them.

The prediction type of its UNet may be stated in two ways. In the metadata, by
modelspec.prediction_type, "v" or "epsilon" (ModelSpec, github.com/Stability-AI/ModelSpec); and by an
empty tensor v_pred and, for zero terminal SNR, one named ztsnr (NoobAI; so ComfyUI and
stable-diffusion-webui read it).
"""

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
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

# The parts that a file has; GeneratorConfig's other fields come from elsewhere.
SDXL = {
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
"""Prediction types that can be given where a file states none, or another one."""


def load_config(path, *, image_encoder=None, tokenizer=None, adapter=None, prediction_type=""):
    """The `GeneratorConfig` of a file with what completes it.

    Args:
      image_encoder: folder of transformers' image encoder.
      tokenizer: folder of its files (see `vocabulary`).
      adapter: an IP-Adapter file; None is a new adapter.
      prediction_type: one of PREDICTION_TYPES; "" is what the file says.

    Raises:
      UserError: something is missing or damaged, or does not fit the rest.
    """
    path = epath.Path(path)
    tensor_file.read(path)  # What it is comes first.
    missing = [
        f"config.model.{field}"
        for field, folder in (("image_encoder", image_encoder), ("tokenizer", tokenizer))
        if folder is None
    ]
    if missing:
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
    # As in the scheduler_config.json that is published with SDXL.
    return diffusers_folder.generator_config(
        parts, adapter, image_encoder, zero_empty_prompt=True, set_alpha_to_one=False, **noise
    )


def prediction(name):
    """`GeneratorConfig`'s fields of one of PREDICTION_TYPES."""
    return {
        "prediction_type": name.removesuffix("_zero_snr"),
        "zero_terminal_snr": name.endswith("_zero_snr"),
    }


def _prediction_of(path):
    """The prediction type that a file states; epsilon where it states none."""
    tensors, metadata = tensor_file.read(path)
    v_pred, zero_snr = (name in tensors for name in original_names.MARKERS)
    said = metadata.get("modelspec.prediction_type", "")
    known = {
        "": "epsilon",
        "epsilon": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
    }
    cure = f"Set config.model.prediction_type to one of {', '.join(PREDICTION_TYPES)}."
    if said not in known:
        raise UserError(
            f"{path} has modelspec.prediction_type = {said!r} in its metadata; known "
            f"are 'epsilon' and 'v'. {cure}"
        )
    if v_pred and said == "epsilon":
        logging.warning(
            "%s says v by its tensor v_pred and epsilon in its metadata; read as v", path
        )
    kind = "v_prediction" if v_pred else known[said]
    if zero_snr and kind == "epsilon":
        raise UserError(
            f"{path} has a tensor ztsnr, for noise of zero terminal SNR, but neither "
            f"v_pred nor modelspec.prediction_type = 'v', without which it means nothing. "
            f"{cure}"
        )
    return {"prediction_type": kind, "zero_terminal_snr": zero_snr}


def open_part(path, part, example, config, *, adapter=None, image_encoder=None):
    """Finds the tensors of one part and checks names and shapes; only headers are read.

    Args:
      path: the file.
      part: one of `generator.PARTS`.
      example: the tree expected, of arrays or `jax.ShapeDtypeStruct`s, without "params".
      config: the part's configuration, SDXL[part] for a published file.
      adapter: path of an IP-Adapter file for the UNet's image branch, which otherwise starts as a
        copy of the text's projections.
      image_encoder: folder of the image encoder.

    Returns:
      {path in `stacking.split(example)`: LazyTensor}, for `tensor_file.load`; None for "adapter"
      without such a file.

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape. Missing ones
        are called by diffusers' names.
    """
    if part == "adapter":
        return None if adapter is None else diffusers_folder.open_adapter(adapter, example)
    if part == "image_encoder":
        tensors = diffusers_folder.read_tensors(image_encoder, part)
        return pytorch_names.fit(tensors, example, str(image_encoder))
    tensors, _ = tensor_file.read(path)
    pytorch_names.require_fit(str(path), {"unexpected": original_names.foreign(tensors)})
    found = original_names.to_diffusers(tensors, pytorch_names.names(example), part, config)
    if part == "unet" and adapter is not None:
        projections, _ = tensor_file.read(adapter)
        found |= ip_adapter.to_diffusers(projections, example, str(adapter))[0]
    elif part == "unet":
        found |= ip_adapter.fresh_branch(found, example)
    return pytorch_names.fit(found, example, f"{path}, {part},")


def load_part(path, part, example, config, *, dtype=None, sharding=None, **files):
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
