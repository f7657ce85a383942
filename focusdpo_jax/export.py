"""Writes a run's result for diffusers: `python -m focusdpo_jax.export --workdir=RUN --output=OUT`.

What lies in OUT, and how to load it, stands in its README.md.
"""

import os

from absl import flags

from focusdpo_jax import command

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a finished run of focusdpo_jax.main. May be gs://.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write to; created if missing. May be gs://.")
_WHOLE = flags.DEFINE_bool(
    "whole", False, "Also write the parts that the run did not train, so that the folder is a "
    "complete pipeline.")


def main():
    """Flags, then `run_export.export_run`."""
    from focusdpo_jax.checkpoints import run_export  # After the flags, so that --help is quick.
    run_export.export_run(_WORKDIR.value, _OUTPUT.value, whole=_WHOLE.value)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Nothing is computed.
    flags.mark_flags_as_required(["workdir", "output"])
    command.run(main)
