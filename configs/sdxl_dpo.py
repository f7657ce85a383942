r"""FocusDPO on SDXL with an IP-Adapter; docs/sdxl.md goes through it from download to diffusers.

    python -m focusdpo_jax.main --config=configs/sdxl_dpo.py --config.model.pretrained=DIR
    python -m focusdpo_jax.main --config=configs/sdxl_dpo.py:lora --config.model.pretrained=DIR
    python -m focusdpo_jax.main --config=configs/sdxl_dpo.py:debug

Without an argument it trains the adapter, with `:lora` low-rank updates, with `:full` UNet and
adapter. `:paper` trains the adapter with the objective as the paper describes it (docs/method.md).
`:debug` needs no files: SDXL's anatomy with small random weights, minutes on a laptop.

Fields that are not stated here have their defaults; `--print_config` prints all with their meaning. The
numbers of training are starting points from the literature, not measured here at this size.
"""

import ml_collections

from focusdpo_jax import config as config_lib

ARGUMENTS = ("", "lora", "full", "paper", "debug")


def get_config(argument=""):
    """The configuration; every field can be set on the command line as --config.FIELD=VALUE."""
    if argument not in ARGUMENTS:
        raise ValueError(
            f"sdxl_dpo takes {', '.join(filter(None, ARGUMENTS))} or nothing after "
            f"the colon, not {argument!r}"
        )
    config = config_lib.defaults()
    # 5000 is Diffusion-DPO's beta, for uniform weights.
    config.match_beta = True
    # Without these, the errors of chosen and rejected images both rise on Toybox (docs/study.md).
    config.anchor = 1.0
    config.preserve_winner = True
    if argument == "lora":
        config.trainable = "lora"
        config.model.lora_rank = 32
    elif argument == "full":
        config.trainable = "full"
        config.learning_rate = 1e-6
        config.batch_size = 4
        config.accumulate = 1
    elif argument == "paper":
        _follow_paper(config)
    elif argument == "debug":
        _make_small(config)
    return config


def _follow_paper(config):
    """What the paper's abstract and figures state; its numbers are not public."""
    config.anchor = 0.0
    config.preserve_winner = False
    config.focus.features = "attention"
    config.focus.lambda_c = 1.0
    config.focus.reference_detail = True


def _make_small(config):
    """Random weights and few pairs, for one GPU or a CPU; nothing to download."""
    config.resolution = 64
    config.model.pretrained = ""
    config.model.sizes = sizes()
    config.model.scan_layers = True  # Compiles faster.
    # A random UNet lets no gradient through to an adapter.
    config.trainable = "full"
    config.learning_rate = 1e-3
    config.weight_decay = 0.0
    config.warmup_steps = 1
    config.steps = 6
    config.batch_size = 4
    config.accumulate = 1
    config.log_every = 1
    config.checkpoint_every = 3
    config.sample_every = 3
    config.data.train_size = 32
    config.data.validation_size = 4
    config.data.test_size = 4
    config.data.cache = True
    config.sampling.steps = 4


def sizes():
    """SDXL's anatomy, small: three levels, transformers of depth 0, 1 and 2, two text encoders."""
    text = {
        "vocab_size": 573,
        "max_length": 16,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 64,
        "eos_token_id": 572,
    }
    return ml_collections.ConfigDict(
        {
            "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_groups": 8},
            "text_encoder": {**text, "activation": "quick_gelu", "projection_dim": None},
            "text_encoder_2": {**text, "activation": "gelu", "projection_dim": 32},
            "image_encoder": {
                "image_size": 32,
                "patch_size": 4,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 64,
                "projection_dim": 32,
            },
            "adapter": {
                "input_dim": 32,
                "output_dim": 64,
                "num_tokens": 4,
                "width": 32,
                "depth": 4,
                "num_heads": 1,
            },
            "unet": {
                "block_out_channels": (16, 32, 32),
                "transformer_layers_per_block": (0, 1, 2),
                "mid_transformer_layers": 2,
                "num_heads": (1, 2, 2),
                "cross_attention_dim": 64,
                "addition_time_embed_dim": 16,
                "pooled_dim": 32,
                "norm_groups": 8,
                "image_context": True,
            },
        }
    )
