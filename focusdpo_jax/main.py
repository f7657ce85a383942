"""Trains a generator: `python -m focusdpo_jax.main --config=configs/toybox_dpo.py`.

Run the same line again to go on where a run stopped. Any field of the configuration can be changed
on the command line, for example `--config.beta=2000 --config.objective=dpo`.
"""

from absl import flags
from ml_collections import config_flags

from focusdpo_jax import command

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/toybox_dpo.py. Some take an argument "
    "after a colon: configs/toybox_base.py:probe. Override fields by --config.FIELD=VALUE.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics.jsonl, TensorBoard events, samples, "
    "the trained model. Default: runs/<config name>. May be gs://.")


def main():
    """Flags, then `training.loop.run`."""
    from focusdpo_jax.training import loop  # After the flags, so that --help is quick.
    workdir = _WORKDIR.value or command.default_workdir(
        config_flags.get_config_filename(FLAGS["config"]))
    loop.run(_CONFIG.value, workdir)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main, command.config_parser(_CONFIG))
