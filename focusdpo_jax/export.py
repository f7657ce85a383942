"""Writes a run's result for diffusers: `python -m focusdpo_jax.export --workdir=RUN --output=OUT`.

What lies in OUT, of which step it is, and how to load it, stands in its README.md. Of a run that is not
finished, or that went on afterwards, the newest checkpoint is written.
"""

import os

from absl import flags

from focusdpo_jax import command

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run of focusdpo_jax.main. May be gs://."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write to; created if missing. May be gs://."
)
_WHOLE = flags.DEFINE_bool(
    "whole",
    False,
    "Also write the parts that the run did not train, so that the folder is a complete pipeline.",
)

_CHECK = flags.DEFINE_bool(
    "check",
    False,
    "Then open what was written with diffusers, as the README.md says, draw one image "
    "there and one here from the same noise, and print how far they differ; more than 2/255, or 0.1/255 in "
    "the mean, is an error. "
    "Needs diffusers and PyTorch (and PEFT for LoRA), which nothing else here does. Exports without "
    "--whole are checked on the model that the run started from.",
)


def main():
    """Flags, then `run_export.export_run` and `export_check.check`."""
    from focusdpo_jax.checkpoints import (
        run_export,  # After the flags, so that --help is quick.
    )
    from focusdpo_jax.training import runs

    if _CHECK.value:
        from focusdpo_jax.evaluation import export_check

        export_check.require_packages()  # Before anything is written.
    names = run_export.export_run(
        _WORKDIR.value,
        _OUTPUT.value,
        whole=_WHOLE.value,
        read_checkpoint=lambda: runs.Run(_WORKDIR.value).checkpoint(),
    )
    if _CHECK.value:
        print(
            export_check.describe(
                export_check.check(_WORKDIR.value, _OUTPUT.value, names, whole=_WHOLE.value), names
            )
        )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Little is computed, if anything.
    flags.mark_flags_as_required(["workdir", "output"])
    command.run(main)
