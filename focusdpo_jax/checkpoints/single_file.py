"""An SDXL model in one safetensors file of the original layout (see original_names).

Such a file says nothing about sizes: they are those of SDXL base 1.0, and a file of other sizes
is refused by the tensors that do not fit. Image encoder and vocabulary, which it lacks, lie in
folders as a diffusers pipeline has them.
"""

from etils import epath

from focusdpo_jax.checkpoints import (
    diffusers_folder,
    ip_adapter,
    original_names,
    pytorch_names,
    tensor_file,
)
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.clip import CLIPTextConfig
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

# The parts that a file has; GeneratorConfig's other fields come from elsewhere.
SDXL = {
    "unet": UNetConfig(image_context=True), "vae": VAEConfig(), "text_encoder": CLIPTextConfig(),
    "text_encoder_2": CLIPTextConfig(hidden_size=1280, num_layers=32, num_heads=20,
                                     intermediate_size=5120, activation="gelu",
                                     projection_dim=1280)}


def load_config(path, *, image_encoder=None, tokenizer=None, adapter=None):
    """The `GeneratorConfig` of a file with what completes it.

    Args:
      image_encoder: folder of transformers' image encoder.
      tokenizer: folder of vocab.json and merges.txt.
      adapter: an IP-Adapter file; None is a new adapter.

    Raises:
      UserError: something is missing or damaged, or does not fit the rest.
    """
    path = epath.Path(path)
    missing = [f"config.model.{field}" for field, folder
               in (("image_encoder", image_encoder), ("tokenizer", tokenizer)) if folder is None]
    if missing:
        raise UserError(f"{path} is a single file, which has neither image encoder nor tokenizer: "
                        f"give {' and '.join(missing)}. {diffusers_folder.FETCH}")
    missing = diffusers_folder.missing_files({"image_encoder": epath.Path(image_encoder)},
                                             epath.Path(tokenizer))
    if missing:
        raise UserError(f"{path} needs {', '.join(missing)}. {diffusers_folder.FETCH}")
    parts = SDXL | {"image_encoder": diffusers_folder.read_part_config(
        epath.Path(image_encoder), "image_encoder")}
    return diffusers_folder.generator_config(parts, adapter, image_encoder, zero_empty_prompt=True)


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
        open_part(path, part, example, config, **files), example, dtype, sharding)
