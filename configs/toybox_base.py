"""Makes the small generator that ships with the package, in six stages; see docs/toybox.md.

    python -m focusdpo_jax.main --config=configs/toybox_base.py:autoencoder
    python -m focusdpo_jax.main --config=configs/toybox_base.py:image_encoder
    python -m focusdpo_jax.main --config=configs/toybox_base.py:probe
    python -m focusdpo_jax.main --config=configs/toybox_base.py:generator
    python -m focusdpo_jax.main --config=configs/toybox_base.py:generated_probe
    python -m focusdpo_jax.main --config=configs/toybox_base.py:confusion

Each stage starts from the model folder that the one before it left in `runs/`. Fields that are not stated
here have their defaults; `--print_config` prints all with their meaning.
"""

import ml_collections

from focusdpo_jax import config as config_lib

STAGES = (
    "autoencoder",
    "image_encoder",
    "probe",
    "generator",
    "generated_probe",
    "confusion",
)


def get_config(stage="generator"):
    """The configuration of one stage."""
    if stage not in STAGES:
        raise ValueError(f"toybox_base has the stages {', '.join(STAGES)}, not {stage!r}")
    config = config_lib.defaults()
    config.resolution = 64
    config.dtype = "float32"
    config.model.remat = False
    config.model.scan_layers = True
    config.trainable = "generator"
    config.beta = 1.0  # Not used.
    config.accumulate = 1
    config.optimizer = "muon"
    config.learning_rate = 1e-2
    config.warmup_steps = 100
    config.decay = "cosine"
    config.weight_decay = 1e-4
    config.adam_b2 = 0.99
    config.ema_decay = 0.995
    config.log_every = 50
    config.checkpoint_every = 200
    config.sample_every = 1000

    config.data.seed = 7
    config.data.train_size = 12000
    config.data.validation_size = 128
    config.data.test_size = 256
    config.data.same_class_probability = 0.1
    config.data.cache = True

    config.focus.buckets = 1
    config.focus.prototypes = 1
    config.focus.spaf = False
    config.focus.dpce = False
    config.focus.background = 0.25
    config.focus.detail_sigma = 3.0
    config.sampling.steps = 16
    config.sampling.guidance = 2.0
    config.evaluation.scenes = 256
    config.evaluation.batch_size = 32
    config.evaluation.pictures = 8
    config.evaluation.validation_scenes = 128
    {
        "autoencoder": _autoencoder,
        "image_encoder": _image_encoder,
        "probe": _probe,
        "generator": _generator,
        "generated_probe": _generated_probe,
        "confusion": _confusion,
    }[stage](config)
    return config


def _autoencoder(config):
    config.objective = "autoencode"
    config.model.pretrained = ""
    config.model.sizes = sizes()
    config.steps = 5000
    config.batch_size = 24


def _image_encoder(config):
    config.objective = "attributes"
    config.model.pretrained = "runs/toybox_base_autoencoder/model"
    config.steps = 1500
    config.batch_size = 16


def _probe(config):
    config.objective = "probe"
    config.model.pretrained = "runs/toybox_base_image_encoder/model"
    config.steps = 2500
    config.batch_size = 16


def _denoiser(config):
    """What both stages of the generator share: subjects weigh more than background."""
    config.objective = "subject_sft"
    config.batch_size = 32
    # For classifier-free guidance.
    config.condition_dropout = (0.07, 0.07, 0.07)
    # Shape and look of a subject are decided somewhat above the middle, where it as a whole outweighs the
    # noise.
    config.timestep_logits = (0.6, 1.0)


def _generator(config):
    """UNet, subject adapter and both text encoders."""
    _denoiser(config)
    config.model.pretrained = "runs/toybox_base_probe/model"
    config.steps = 20000
    config.learning_rate = 6e-3
    # The learning rate is constant until the last fifth, so that steps can still be added.
    config.decay = "wsd"
    config.ema_decay = 0.999


def _generated_probe(config):
    """The probe once more, with images of the generator."""
    config.objective = "generated_probe"
    config.model.pretrained = "runs/toybox_base_generator/model"
    config.steps = 2500
    config.learning_rate = 4e-3
    config.batch_size = 16


def _confusion(config):
    """The fault that preference training is to mend, as large generators have it from unfiltered data.

    The subject adapter and the image keys and values learn from rejected images, in which subjects have
    looks of their neighbours.
    """
    _denoiser(config)
    config.trainable = "adapter"
    config.model.pretrained = "runs/toybox_base_generated_probe/model"
    config.rejected_share = 1.0
    config.data.leak_probability = 1.0
    config.data.train_size = 3000
    config.optimizer = "adamw"
    config.learning_rate = 2e-3
    config.warmup_steps = 20
    config.ema_decay = 0.98
    config.steps = 400
    config.sample_every = 200


def sizes():
    """SDXL's anatomy at a thousandth of its size: images of 64 x 64, latents of 16 x 16 x 16."""
    text = {
        "vocab_size": 573,
        "max_length": 16,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 128,
        "eos_token_id": 572,
    }
    return ml_collections.ConfigDict(
        {
            "vae": {
                "block_out_channels": (8, 32, 64),
                "layers_per_block": 1,
                "latent_channels": 16,
                "norm_groups": 8,
                "scaling_factor": 1.0,
            },
            "text_encoder": {**text, "activation": "quick_gelu", "projection_dim": None},
            "text_encoder_2": {**text, "activation": "gelu", "projection_dim": 64},
            "image_encoder": {
                "image_size": 64,
                "patch_size": 4,
                "hidden_size": 64,
                "num_layers": 4,
                "num_heads": 4,
                "intermediate_size": 256,
                "activation": "gelu",
                "projection_dim": 64,
            },
            "adapter": {
                "kind": "resampler",
                "input_dim": 64,
                "output_dim": 128,
                "num_tokens": 8,
                "width": 64,
                "depth": 2,
                "num_heads": 4,
                "head_dim": 16,
                "expansion": 4,
                "dropped": "absent",
            },
            "unet": {
                "in_channels": 16,
                "out_channels": 16,
                "block_out_channels": (48, 96),
                "transformer_layers_per_block": (0, 2),
                "mid_transformer_layers": 2,
                "layers_per_block": 1,
                "num_heads": (2, 4),
                "cross_attention_dim": 128,
                "addition_time_embed_dim": 16,
                "pooled_dim": 64,
                "norm_groups": 8,
                "image_context": True,
            },
            "prediction_type": "v_prediction",
            "zero_terminal_snr": True,
        }
    )
