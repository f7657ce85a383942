"""Writes a run's result for diffusers: `python -m focusdpo_jax.export --workdir=RUN --output=OUT`.

OUT/README.md describes the files, their training step, and how to load them. If a run is
unfinished, or was continued later, the newest checkpoint is exported.
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
    "Then open the export with diffusers, as its README.md describes, generate one image with "
    "diffusers and one with this package from the same noise, and print their difference; more "
    "than 2/255, or 0.1/255 in the mean, is an error. Needs diffusers and PyTorch (and PEFT for "
    "LoRA). Exports without --whole are checked on the model that the run started from.",
)


def main() -> None:
    """Reads the flags and runs `run_export.export_run` and `export_check.check`."""
    # Imported after the flags are parsed, so that --help is fast.
    from focusdpo_jax.checkpoints import run_export
    from focusdpo_jax.training import runs

    def export():
        return run_export.export_run(
            _WORKDIR.value,
            _OUTPUT.value,
            whole=_WHOLE.value,
            read_checkpoint=lambda: runs.Run(_WORKDIR.value).checkpoint(),
        )

    if not _CHECK.value:
        export()
        return
    from focusdpo_jax.training import export_check

    export_check.require_packages()  # Before anything is written.
    names = export()
    difference = export_check.check(_WORKDIR.value, _OUTPUT.value, names, whole=_WHOLE.value)
    print(export_check.describe(difference, names))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Exporting needs almost no computation.
    flags.mark_flags_as_required(["workdir", "output"])
    command.run(main)
