r"""FocusDPO on Toybox, the embedded default: a few minutes on a laptop, nothing to download.

    python -m focusdpo_jax.main --config=configs/toybox_dpo.py
    python -m focusdpo_jax.main --config=configs/toybox_dpo.py --workdir=runs/dpo \
        --config.objective=dpo

Fields that are not stated here have their defaults; `--print_config` prints all with their meaning.
"""

from focusdpo_jax import config as config_lib


def get_config():
    """The configuration; every field can be set on the command line as --config.FIELD=VALUE."""
    config = config_lib.defaults()
    config.resolution = 64
    config.dtype = "float32"
    config.model.pretrained = "toybox-leaky"
    config.model.remat = False
    config.model.scan_layers = True

    # Chosen on validation scenes (docs/toybox.md).
    config.beta = 100.0
    config.anchor = 4.0
    config.preserve_winner = True
    config.steps = 96
    config.batch_size = 16
    config.accumulate = 1
    config.learning_rate = 1.5e-3
    config.warmup_steps = 10
    config.decay = "cosine"
    config.weight_decay = 0.0
    config.adam_b2 = 0.99
    config.checkpoint_every = 48
    config.sample_every = 0  # Only at the end.

    config.data.train_size = 768
    config.data.test_size = 256
    config.data.leak_probability = 1.0
    config.data.cache = True

    # A reference has 256 patches, and a latent covers 4 pixels.
    config.focus.prototypes = 16
    config.focus.detail_sigma = 3.0

    config.sampling.steps = 8
    config.sampling.guidance = 2.0
    config.evaluation.scenes = 256
    config.evaluation.batch_size = 32
    config.evaluation.pictures = 8
    return config
