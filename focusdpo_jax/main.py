"""Trains a generator: `python -m focusdpo_jax.main --config=configs/toybox_dpo.py`.

Run the same line again to go on where a run stopped. Any field of the configuration can be changed
on the command line, for example `--config.beta=2000 --config.objective=dpo`.
"""

from absl import flags
from etils import epath
from ml_collections import config_flags

from focusdpo_jax import command

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/toybox_dpo.py. Some take an argument "
    "after a colon: configs/toybox_base.py:probe. Override fields by --config.FIELD=VALUE.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics.jsonl, TensorBoard events, samples, "
    "the trained model. Default: runs/<config name>. May be gs://.")


def default_workdir(config_argument):
    """runs/toybox_dpo for configs/toybox_dpo.py; an argument after the colon is added."""
    path, _, argument = config_argument.partition(":")
    name = epath.Path(path).stem
    return epath.Path("runs") / (f"{name}_{argument}" if argument else name)


def parse_flags(argv):
    """Parses the command line; whatever is wrong with it is one line.

    A configuration is Python, so that a mistake in it or in --config.FIELD can raise anything.
    """
    try:
        rest = FLAGS(argv)
        _CONFIG.value.get("seed")  # A file that cannot be read fails at its first use.
        return rest
    except Exception as error:  # Raised by absl, ml_collections or the configuration file.
        lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()]
        lines = [line for line in lines if line]
        if isinstance(error, AttributeError):  # Of --config.FIELD: the name, then a suggestion.
            name, *suggestion = (line.strip("\\'") for line in lines)
            command.fail(f"config.{name} is not a field. {' '.join(suggestion)}")
        command.fail(lines[-1].removeprefix("ValueError: ") if lines else repr(error))


def main():
    """Flags, then `training.loop.run`."""
    from focusdpo_jax.training import loop  # After the flags, so that --help is quick.
    workdir = _WORKDIR.value or default_workdir(
        config_flags.get_config_filename(FLAGS["config"]))
    loop.run(_CONFIG.value, workdir)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main, parse_flags)
