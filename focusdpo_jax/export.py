"""Writes a run's result for diffusers: `python -m focusdpo_jax.export --workdir=RUN --output=OUT`.

What lies in OUT, and how to load it, stands in its README.md.
"""

import os
import sys

from absl import app, flags, logging

from focusdpo_jax.errors import UserError

FLAGS = flags.FLAGS
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a finished run of focusdpo_jax.main. May be gs://.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write to; created if missing. May be gs://.")
_WHOLE = flags.DEFINE_bool(
    "whole", False, "Also write the parts that the run did not train, so that the folder is a "
    "complete pipeline.")


def parse_flags(argv):
    """Parses the command line; whatever is wrong with it is one line."""
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()))


def fail(message):
    """Ends the program with one line that says what was wrong."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv):
    """Flags, then `run_export.export_run`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags are written --name=value")
    from focusdpo_jax.checkpoints import run_export  # After the flags, so that --help is quick.
    try:
        run_export.export_run(_WORKDIR.value, _OUTPUT.value, whole=_WHOLE.value)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Nothing is computed.
    logging.set_verbosity(logging.INFO)
    flags.mark_flags_as_required(["workdir", "output"])
    app.run(main, flags_parser=parse_flags)
