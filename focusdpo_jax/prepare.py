"""Builds a data set of your own images: `python -m focusdpo_jax.prepare --manifest=pairs.jsonl`.

A manifest has one JSON object per line, with paths relative to its folder:

    {"caption": "a dog on grass", "chosen": "1/good.png", "rejected": "1/spoilt.png",
     "subjects": [{"phrase": "a dog", "reference": "dog.jpg", "reference_mask": "dog_mask.png",
                   "mask": "1/dog_mask.png"}]}

All lines are checked before anything is written; docs/data.md lists all fields and checks. Run the
same command again to continue an interrupted build. Then train with
--config.data.source=prepared --config.data.path=DATA.
"""

import os
from collections.abc import Callable

from absl import flags
from etils import epath

from focusdpo_jax import command
from focusdpo_jax.errors import UserError

_MANIFEST = flags.DEFINE_string(
    "manifest", None, "File of JSON lines that describes the pairs. May be gs://."
)
_DREAMBENCH = flags.DEFINE_string(
    "dreambench",
    None,
    "Instead of a manifest, a folder in DreamBench's layout: a folder per "
    "subject with 00.jpg, 00_mask.png and so on, and prompts_and_classes.txt. Pairs of "
    "its photographs are written to OUTPUT/source, with a manifest.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder for the data set, report.json and contact_sheet.png; created if missing. May be gs://.",
)
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 512, "Side in pixels of the square images to train on: 1024 for SDXL."
)
_ON_ERROR = flags.DEFINE_enum(
    "on-error",
    "fail",
    ["fail", "skip"],
    "What to do about lines that cannot be used: write only the report, or leave them out.",
)
_MAX_SUBJECTS = flags.DEFINE_integer("max_subjects", 3, "Largest number of subjects of a line.")
_VALIDATION = flags.DEFINE_float(
    "validation",
    0.05,
    "Fraction of the groups of pairs that is held out from training, for sample images.",
)
_TEST = flags.DEFINE_float(
    "test", 0.05, "Fraction of the groups that is held out from training, for evaluation."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Folder with CLIP's vocab.json and merges.txt, or tokenizer.json, as in a model's "
    "tokenizer/: captions that are too long for CLIP are then detected exactly. Without it, only "
    "captions with too many words under any vocabulary are detected.",
)
_WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count() or 1, "Processes that read, check and resize images.", lower_bound=1
)


def main() -> None:
    """Reads the flags and runs `data.prepare.prepare`."""
    # Imported after the flags are parsed, so that --help is fast.
    from focusdpo_jax.data import dreambench, prepare, report
    from focusdpo_jax.visualization import contact_sheet

    if (_MANIFEST.value is None) == (_DREAMBENCH.value is None):
        raise UserError("give --manifest, or --dreambench with a folder of photographs")
    settings = prepare.Settings(
        resolution=_RESOLUTION.value,
        max_subjects=_MAX_SUBJECTS.value,
        validation=_VALIDATION.value,
        test=_TEST.value,
    )
    output = epath.Path(_OUTPUT.value)
    manifest = _MANIFEST.value
    if manifest is None:
        manifest = dreambench.write_manifest(_DREAMBENCH.value, output / "source")
    result = prepare.prepare(
        manifest,
        output,
        settings,
        draw_sheet=contact_sheet.draw,
        workers=_WORKERS.value,
        skip=_ON_ERROR.value == "skip",
        count_tokens=token_counter(),
    )
    print(report.describe(result))
    print(f"data set, report.json and contact_sheet.png: {output}")


def token_counter() -> Callable[[str], int] | None:
    """Returns the function that counts a caption's tokens, or None without --tokenizer."""
    if _TOKENIZER.value is None:
        return None
    from focusdpo_jax.models.tokenizer import Tokenizer

    return Tokenizer(_TOKENIZER.value, 77).count


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    command.run(main, resumable=True)
