"""Sizes of published subject adapters by the names of their files, for files that are not here."""

import re

from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig

# OpenCLIP ViT-bigG/14, which h94/IP-Adapter has as sdxl_models/image_encoder; the other is ViT-H/14.
_BIG_G = {
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_layers": 48,
    "num_heads": 16,
    "projection_dim": 1280,
}


def adapter_sizes(name):
    """What `config.model.adapter` would hold, were it here, and the image encoder that it reads.

    Args:
      name: of a file. `ip-adapter...` is a projection unless it is `ip-adapter-plus...`: for ViT-H if
        it says so ("vit-h"), else for ViT-bigG. Anything else is taken for IP-Adapter-Plus, and "" for a
        new adapter of its sizes.

    Returns:
      (SubjectAdapterConfig, CLIPVisionConfig).
    """
    file = name.rsplit("/", 1)[-1]
    if not re.match(r"ip-adapter(?!-plus)", file):
        own = {"dropped": "blank"} if file else {}
        return SubjectAdapterConfig(**own), CLIPVisionConfig()
    encoder = CLIPVisionConfig() if "vit-h" in file else CLIPVisionConfig(**_BIG_G)
    return SubjectAdapterConfig(
        kind="projection", input_dim=encoder.projection_dim, num_tokens=4, dropped="blank"
    ), encoder
