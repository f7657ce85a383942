"""Sizes of published subject adapters by the names of their files, without the files."""

import re

from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig

# OpenCLIP ViT-bigG/14, sdxl_models/image_encoder of h94/IP-Adapter. Its models/image_encoder is
# ViT-H/14, the default of CLIPVisionConfig.
_BIG_G = CLIPVisionConfig(
    hidden_size=1664, intermediate_size=8192, num_layers=48, num_heads=16, projection_dim=1280
)


def adapter_sizes(name: str) -> tuple[SubjectAdapterConfig, CLIPVisionConfig]:
    """Returns the configuration of an adapter and its image encoder from a file name.

    Args:
      name: name of a file, which need not exist. `ip-adapter...` is a projection unless it is
        `ip-adapter-plus...`: for ViT-H if the name has "vit-h", else for ViT-bigG. Any other name
        means IP-Adapter-Plus, and "" a new adapter of its sizes.
    """
    file = name.rsplit("/", 1)[-1]
    if not re.match(r"ip-adapter(?!-plus)", file):
        adapter = SubjectAdapterConfig(dropped="blank") if file else SubjectAdapterConfig()
        return adapter, CLIPVisionConfig()
    encoder = CLIPVisionConfig() if "vit-h" in file else _BIG_G
    assert encoder.projection_dim is not None  # Both have one.
    return SubjectAdapterConfig(
        kind="projection", input_dim=encoder.projection_dim, num_tokens=4, dropped="blank"
    ), encoder
