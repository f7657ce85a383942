r"""Compares the gradients of weighted objectives at the parameters of the base.

    python -m experiments.gradient_gate --config=configs/toybox_dpo.py --pairs=64

Prints, for each setting and each bucket of --config, the cosine of the gradient with the gradients
of prior_dpo (the mask alone) and of dpo (no mask) on the same pairs, timesteps and noise, and the
ratio of its norm to that of dpo at the same beta. The baseline "of halves" is the cosine of the
setting's own gradients on two disjoint halves of the pairs. If the cosine with prior_dpo is near 1,
training with the setting hardly differs from training with prior_dpo. The anchor is left out, since
it adds the same gradient to all settings.
"""

from absl import flags
from ml_collections import config_flags

from focusdpo_jax import command

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration of model, pairs and FocusDPO."
)
_PAIRS = flags.DEFINE_integer("pairs", 64, "Number of training pairs, even.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of timesteps and noise.")
_ONLY = flags.DEFINE_multi_string(
    "only", [], "Settings to measure besides dpo and prior_dpo; all by default."
)

# Fields that each setting changes in the configuration.
SETTINGS = {
    "dpo": {"objective": "dpo"},
    "prior_dpo": {"objective": "prior_dpo"},
    "focus_dpo": {},
    "own_subject": {"focus.own_subject": True},
    "lambda_c 2": {"focus.lambda_c": 2.0},
    "lambda_s 10": {"focus.lambda_s": 10.0},
    "background 0": {"focus.background": 0.0},
    "background 0, matched 0": {"focus.background": 0.0, "focus.matched": 0.0},
    "own_subject, background 0, matched 0, lambda_s 4, lambda_c 2": {
        "focus.own_subject": True,
        "focus.background": 0.0,
        "focus.matched": 0.0,
        "focus.lambda_s": 4.0,
        "focus.lambda_c": 2.0,
    },
    "attention": {"focus.features": "attention"},
    "attention, own_subject": {"focus.features": "attention", "focus.own_subject": True},
}


def main() -> None:
    """Prints the table for the settings in the flags."""
    from experiments import gradients
    from focusdpo_jax import config as config_lib
    from focusdpo_jax.errors import UserError

    if _CONFIG.value is None:
        raise UserError("--config is missing; see --help")
    if _PAIRS.value % 2:
        raise UserError(
            f"--pairs={_PAIRS.value}: give an even number, since the two halves are compared"
        )
    unknown = set(_ONLY.value) - set(SETTINGS)
    if unknown:
        raise UserError(f"--only={min(unknown)!r}: choose among {', '.join(map(repr, SETTINGS))}")
    wanted = {
        name: fields
        for name, fields in SETTINGS.items()
        if name in ("dpo", "prior_dpo") or not _ONLY.value or name in _ONLY.value
    }
    print(
        gradients.format_table(
            gradients.compare(
                config_lib.parse(_CONFIG.value), wanted, pairs=_PAIRS.value, seed=_SEED.value
            )
        )
    )


if __name__ == "__main__":
    command.run(main, command.config_parser(_CONFIG))
