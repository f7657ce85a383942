"""A run small enough for tests: a generator of random weights on a few Toybox scenes."""

import importlib.util
import json
import pathlib

import ml_collections

from focusdpo_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent


def load_config(name, *arguments):
    """The configuration of configs/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def run_config(name, *arguments, **overrides):
    """The RunConfig of configs/<name>.py with other values (dots as double underscores), unchecked."""
    return changed(config_lib.parse(load_config(name, *arguments)), **overrides)


# Every field that makes the default run small; the same in every test, so that compiled programs
# are shared through the compilation cache.
OVERRIDES = {
    "resolution": 32,
    "steps": 4,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 100,
    "warmup_steps": 1,
    "decay": "constant",
    "learning_rate": 1e-3,
    "beta": 100.0,
    "anchor": 1.0,
    "preserve_winner": False,
    # Smaller than the default: at 32 pixels, large subjects fill most of an image.
    "data.subject_radii": (14.0, 13.0, 11.5),
    "data.pattern_scale": 1.0,
    "data.train_size": 12,
    "data.validation_size": 2,
    "data.test_size": 4,
    "evaluation.scenes": 0,
    "evaluation.batch_size": 2,
    "evaluation.pictures": 2,
    "sampling.steps": 2,
    "sampling.guidance": 1.0,
}

SIZES = {
    "vae": {
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "norm_groups": 4,
        "mid_attention": False,
        "scaling_factor": 1.0,
    },
    "text_encoder": {
        "vocab_size": 573,
        "max_length": 16,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "eos_token_id": 572,
    },
    "text_encoder_2": {
        "vocab_size": 573,
        "max_length": 16,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "eos_token_id": 572,
        "projection_dim": 8,
    },
    "image_encoder": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "projection_dim": 8,
    },
    "adapter": {
        "input_dim": 8,
        "output_dim": 16,
        "num_tokens": 2,
        "width": 8,
        "depth": 1,
        "num_heads": 2,
        "head_dim": 4,
        "expansion": 2,
    },
    "unet": {
        "block_out_channels": (8, 8),
        "transformer_layers_per_block": (0, 2),
        "mid_transformer_layers": 0,
        "layers_per_block": 1,
        "num_heads": (2, 2),
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 4,
        "pooled_dim": 8,
        "norm_groups": 4,
        "image_context": True,
    },
    "prediction_type": "v_prediction",
    "zero_terminal_snr": True,
}


def tiny_config(folder, **overrides):
    """The default RunConfig with OVERRIDES, then `overrides` (dots as double underscores), unchecked.

    Data and model are in `folder`; `model__pretrained=""` makes a model of SIZES instead.
    """
    changes = OVERRIDES | {
        "data.path": str(folder / "data"),
        "model.pretrained": str(folder / "model"),
    }
    changes |= {name.replace("__", "."): value for name, value in overrides.items()}
    if not changes["model.pretrained"]:
        changes.setdefault("model.sizes", SIZES)
    return config_lib.replace(config_lib.parse(load_config("toybox_dpo")), changes)


def tiny_file_config(folder, **overrides):
    """The ConfigDict of `tiny_config`, for a configuration file."""
    return ml_collections.ConfigDict(config_lib.to_dict(tiny_config(folder, **overrides)))


def changed(config, **overrides):
    """A RunConfig with other values (dots as double underscores), unchecked."""
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    return config_lib.replace(config, changes)


def losses(workdir):
    """{step: loss} of a run's metrics.jsonl, which must have no step twice."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}
