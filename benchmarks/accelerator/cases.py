"""Configurations: SDXL with IP-Adapter-Plus, or its architecture at debugging sizes."""

from typing import Any

import jax
from benchmark_cases import changed, load_config

from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import models

# The smallest UNet with all kinds of blocks, which compiles in seconds.
_SMALL_UNET = {
    "block_out_channels": (16, 32),
    "transformer_layers_per_block": (0, 1),
    "mid_transformer_layers": 1,
    "num_heads": (1, 2),
    "layers_per_block": 1,
}


def configuration(settings: Any):
    """The complete configuration of a step or of sampling.

    Args:
      settings: of a job. "size" and "resolution" are required; "dtype", "batch", "trainable",
        "objective", "remat" and "scan_layers" are optional.
    """
    debug = settings["size"] == "debug"
    config = load_config("sdxl_dpo", *(["debug"] if debug else []))
    trainable = settings.get("trainable", "adapter")
    changes: dict[str, Any] = (
        {"model__lora_rank": 4 if debug else 32} if trainable == "lora" else {}
    )
    if debug:
        sizes: dict[str, Any] = dict(config.model.sizes or {})
        sizes["unet"] = {**sizes["unet"], **_SMALL_UNET}
        sizes["adapter"] = {**sizes["adapter"], "depth": 1}
        changes["model__sizes"] = sizes
    return changed(
        config,
        dtype=settings.get("dtype", "bfloat16"),
        objective=settings.get("objective", "dpo"),
        trainable=trainable,
        anchor=0.0,
        # SDXL's beta, 5000, would amplify rounding errors in the losses.
        beta=100.0,
        accumulate=1,
        learning_rate=1e-6,
        warmup_steps=0,
        weight_decay=1e-2,
        resolution=settings["resolution"],
        batch_size=settings.get("batch", 1),
        # Encoders run before the step and are not measured.
        data__cache=True,
        model__remat=settings.get("remat", True),
        model__scan_layers=settings.get("scan_layers", True),
        mesh__data=1,
        mesh__fsdp=1,
        mesh__tensor=1,
        **changes,
    )


def one_device(config: Any):
    """A mesh of the first device."""
    return meshes.make_mesh(config.mesh.sizes, config.batch_size, jax.devices()[:1])


def generator_sizes(size: str):
    """The GeneratorConfig of a size, "full" or "debug"."""
    config = configuration({"size": size, "resolution": 64})
    return models.abstract_model(config, one_device(config))[0].config
