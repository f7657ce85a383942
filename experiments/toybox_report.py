r"""Measures one of Toybox's small generators: autoencoder, accuracy of the probe, generated images.

    python -m experiments.toybox_report --config=configs/toybox_base.py \
        --model=runs/toybox_base_generator/model --output=reports/toybox

Prints the autoencoder's PSNR, and a table of the probe's measures on renders, on their
reconstructions and on generated images of the same scenes. Writes report.json, samples.png with the
first 48 scenes, without selection, and rejected.png with the first scenes in which the probe does
not find the right classes, to be compared by eye. --config sets the world, the sampling steps and
guidance.
"""

import dataclasses
import json

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from focusdpo_jax import command

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration of the world and of sampling."
)
_MODEL = flags.DEFINE_string("model", None, "Model folder, or name of a model in the package.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for report.json and samples.png.")
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Split of the subjects.")
_SCENES = flags.DEFINE_integer("scenes", 512, "Number of scenes to measure.", lower_bound=1)
_PICTURES = flags.DEFINE_integer("pictures", 48, "Number of scenes in samples.png.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Number of scenes processed at once.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise and of the bootstrap.")
_PARTS = flags.DEFINE_multi_enum(
    "parts",
    ["autoencoder", "probe", "generator"],
    ["autoencoder", "probe", "generator"],
    "Parts to measure.",
)


def main() -> None:
    """Measures the model in the flags, and prints and writes the results."""
    # Imported after parsing the flags, so that --help is fast.
    from experiments import toybox_figures
    from focusdpo_jax import config as config_lib
    from focusdpo_jax.errors import UserError
    from focusdpo_jax.files import replace_file
    from focusdpo_jax.toybox.subjects import CLASSES
    from focusdpo_jax.training import runs
    from focusdpo_jax.visualization import grids

    for name, value in (
        ("config", _CONFIG.value),
        ("model", _MODEL.value),
        ("output", _OUTPUT.value),
    ):
        if value is None:
            raise UserError(f"--{name} is missing; see --help")
    config = config_lib.parse(_CONFIG.value)
    model, parts = runs.load_folder(_MODEL.value), _PARTS.value
    if model.probe is None and parts != ["autoencoder"]:
        raise UserError(
            f"--model={_MODEL.value} has no probe.safetensors, which the measures need; "
            "give --parts=autoencoder, or train it (configs/toybox_base.py:probe)"
        )
    figures, tables, scenes, captions, generated = toybox_figures.report(
        model,
        config,
        split=_SPLIT.value,
        count=_SCENES.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        parts=parts,
    )
    if figures:
        print(
            "Autoencoder: "
            + ", ".join(
                f"{name.replace('_', ' ')} {value:.2f} dB" for name, value in figures.items()
            )
        )
    if tables:
        print(f"{_SCENES.value} {_SPLIT.value} scenes; mean and 95 % interval")
        print(toybox_figures.format_tables(tables))
    folder = epath.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(
        folder / "report.json",
        json.dumps(
            {
                "model": _MODEL.value,
                "split": _SPLIT.value,
                "scenes": _SCENES.value,
                "seed": _SEED.value,
                "sampling": dataclasses.asdict(config.sampling),
                "autoencoder": figures,
                "probe": tables,
            },
            indent=2,
            sort_keys=True,
        )
        + "\n",
    )
    if generated is None:
        return
    found = toybox_figures.found_classes(model, generated, _BATCH_SIZE.value)
    counts, rejected = toybox_figures.class_errors(found, scenes.truth["class_id"], scenes.present)
    for subjects, (total, right, extra) in counts.items():
        print(
            f"Scenes of {subjects}: the probe finds the right classes in {right} of {total}, and "
            f"others in addition in {extra}"
        )
    first = _PICTURES.value

    def save(name, indices, caption):
        rows = [
            grids.SampleRow(caption(i), list(scenes.references[i][scenes.present[i]]), generated[i])
            for i in indices[:first]
        ]
        if rows:
            grids.save_png(folder / name, grids.sample_grid(rows, columns=3, scale=2))

    def with_found(i):
        names = [name for name, is_found in zip(CLASSES, found[i]) if is_found]
        return f"{captions[i]}; found: {', '.join(names) or 'none'}"

    save("samples.png", range(len(generated)), lambda i: captions[i])
    save("rejected.png", np.flatnonzero(rejected), with_found)


if __name__ == "__main__":
    command.run(main, command.config_parser(_CONFIG))
