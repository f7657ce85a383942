"""An SDXL model in one safetensors file of the original layout (see original_names).

Such a file says nothing about sizes: they are those of SDXL base 1.0, and a file of other sizes
is refused by the tensors that do not fit.
"""

from flax import traverse_util

from focusdpo_jax.checkpoints import (
    diffusers_folder,
    ip_adapter,
    original_names,
    pytorch_names,
    tensor_file,
)
from focusdpo_jax.models.clip import CLIPTextConfig
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

# The parts that a file has; GeneratorConfig's other fields come from elsewhere.
SDXL = {
    "unet": UNetConfig(image_context=True), "vae": VAEConfig(), "text_encoder": CLIPTextConfig(),
    "text_encoder_2": CLIPTextConfig(hidden_size=1280, num_layers=32, num_heads=20,
                                     intermediate_size=5120, activation="gelu",
                                     projection_dim=1280)}


def load_part(path, part, example, config, *, adapter=None, dtype=None, sharding=None):
    """Reads one part, tensor by tensor.

    Args:
      path: the file.
      part: a key of SDXL.
      example: the tree expected, of arrays or `jax.ShapeDtypeStruct`s, without "params".
      config: the part's configuration, SDXL[part] for a published file.
      adapter: path of an IP-Adapter file for the UNet's image branch, which otherwise starts as a
        copy of the text's projections.
      dtype, sharding: see `diffusers_folder.load_part`.

    Returns:
      A tree like `example`.

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape. Missing ones
        are called by diffusers' names.
    """
    tensors, _ = tensor_file.read(path)
    pytorch_names.require_fit(str(path), {"unexpected": original_names.foreign(tensors)})
    names = [pytorch_names.torch_name(leaf) for leaf in traverse_util.flatten_dict(example)]
    found = original_names.to_diffusers(tensors, names, part, config)
    if part == "unet" and adapter is not None:
        projections, _ = tensor_file.read(adapter)
        found |= ip_adapter.to_diffusers(projections, example, str(adapter))[0]
    elif part == "unet":
        found |= ip_adapter.fresh_branch(found, example)
    return pytorch_names.to_flax(found, example, f"{path}, {part},",
                                 diffusers_folder.placement(dtype, sharding))
