"""Makes rejected images of good ones: `python -m focusdpo_jax.disrupt --manifest=scenes.jsonl`.

Every subject is inpainted inside its mask from its phrase alone: same class, same position, another
individual. A manifest has one JSON object per line, with paths relative to its folder:

    {"caption": "a dog on grass", "chosen": "1/good.png",
     "subjects": [{"phrase": "a dog", "mask": "1/dog_mask.png",
                   "reference": "dog.jpg", "reference_mask": "dog_mask.png"}]}

A missing reference is replaced by the subject's cut-out. OUTPUT/manifest.jsonl is the input of
`prepare --manifest`; inspect OUTPUT/contact_sheet.png first. Run the same command again to continue
an interrupted run. docs/data.md has the details.
"""

from typing import TYPE_CHECKING

from absl import flags

from focusdpo_jax import command
from focusdpo_jax.errors import UserError

if TYPE_CHECKING:
    from focusdpo_jax.disruption.runner import Settings
    from focusdpo_jax.disruption.selection import CandidateScorer
    from focusdpo_jax.training.models import Model

_MANIFEST = flags.DEFINE_string(
    "manifest", None, "File of JSON lines that describes the good images. May be gs://."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder for the pairs, manifest.jsonl, report.json and contact_sheet.png; "
    "created if missing. May be gs://.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    "base",
    "The generator: the folder of a run, or a model: a run's model/, a pipeline of "
    "diffusers, with an inpainting UNet (9 channels) or another (4), or base, the small Toybox "
    "generator that ships with the package.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "phrase",
    ["phrase", "leak"],
    "phrase: each subject is inpainted from its phrase alone. "
    "leak: with the reference of another subject of its scene, whose looks it takes "
    "(needs a model with an image adapter, and two subjects per line).",
)
_STRENGTH = flags.DEFINE_float(
    "strength",
    0.75,
    "Strength of the change, in (0, 1]: the fraction of the steps that is run. Lower values keep "
    "more of the pose and shape, and of the looks as well.",
)
_CANDIDATES = flags.DEFINE_integer(
    "candidates",
    8,
    "Candidates for each subject. The quarter most similar to it is dropped; of "
    "the others the one that matches its phrase best is used.",
    lower_bound=1,
)
_DINOV2 = flags.DEFINE_string(
    "dinov2",
    None,
    "Folder of DINOv2 in transformers' layout, to measure the similarity with the subject. "
    "Default: the patches of the model's own image encoder.",
)
_CLIP = flags.DEFINE_string(
    "clip",
    None,
    "Folder of CLIP in transformers' layout, to measure how well candidates match "
    "their phrase. Default: the decrease of the model's denoising error due to the phrase.",
)
_SEGMENTER = flags.DEFINE_string(
    "segmenter",
    None,
    "Name of an entry point of the group focusdpo_jax.segmenters, which computes missing masks.",
)
_CAPTIONER = flags.DEFINE_string(
    "captioner",
    None,
    "Name of an entry point of the group focusdpo_jax.captioners, which writes "
    "missing phrases and captions.",
)
_ON_ERROR = flags.DEFINE_enum(
    "on-error",
    "fail",
    ["fail", "skip"],
    "What to do about lines that cannot be used: stop before any inpainting, or leave them out.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the new individuals.")
_STEPS = flags.DEFINE_integer(
    "steps",
    30,
    "Denoiser calls of a whole image; the fraction --strength of them is run.",
    lower_bound=1,
)
_GUIDANCE = flags.DEFINE_float(
    "guidance", 5.0, "Classifier-free guidance scale; 1 or less disables guidance."
)
_SAMPLER = flags.DEFINE_string("sampler", "ddim", "ddim, euler, euler_a or dpmpp_2m.")
_RESOLUTION = flags.DEFINE_integer(
    "resolution",
    None,
    "Side in pixels of the squares that the model generates: 1024 for SDXL. Default: the run's.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Candidates generated at once, divided among the devices.", lower_bound=1
)
_MAX_SUBJECTS = flags.DEFINE_integer(
    "max_subjects", 3, "Largest number of subjects of a line.", lower_bound=1
)


def main() -> None:
    """Reads the flags and runs `disruption.runner.disrupt`."""
    # Imported after the flags are parsed, so that --help is fast.
    from focusdpo_jax.data.scene_manifest import Hooks
    from focusdpo_jax.disruption import hooks, runner
    from focusdpo_jax.disruption.inpainting import Inpainter
    from focusdpo_jax.vision.encoders import digest_of
    from focusdpo_jax.visualization import contact_sheet

    found = Hooks(
        hooks.load("segmenter", hooks.SEGMENTERS, _SEGMENTER.value),
        hooks.load("captioner", hooks.CAPTIONERS, _CAPTIONER.value),
    )
    model, resolution = open_model()
    settings = runner.Settings(
        mode=_MODE.value,
        candidates=_CANDIDATES.value,
        seed=_SEED.value,
        steps=_STEPS.value,
        resolution=resolution,
        strength=_STRENGTH.value,
        guidance=_GUIDANCE.value,
        sampler=_SAMPLER.value,
        batch_size=min(_BATCH_SIZE.value, _CANDIDATES.value),
        max_subjects=_MAX_SUBJECTS.value,
    )
    inpainter = Inpainter(model, **settings.inpainting())
    report = runner.disrupt(
        _MANIFEST.value,
        _OUTPUT.value,
        settings,
        inpainter,
        make_scorer(model, settings),
        identity={
            "model": digest_of(model.parameters),
            "segmenter": _SEGMENTER.value,
            "captioner": _CAPTIONER.value,
        },
        count_tokens=lambda text: (model.tokenizer.count(text), model.tokenizer.length),
        draw_sheet=contact_sheet.draw,
        hooks=found,
        skip=_ON_ERROR.value == "skip",
    )
    print(
        f"{report['scenes']} of {report['lines']} lines, {report['subjects']} subjects "
        f"inpainted; inspect {_OUTPUT.value}/contact_sheet.png, then run:"
    )
    print(
        f"python -m focusdpo_jax.prepare --manifest={_OUTPUT.value}/manifest.jsonl "
        f"--resolution={resolution} --output=DATA"
    )


def open_model() -> "tuple[Model, int]":
    """Returns the generator, and the side of its images."""
    from focusdpo_jax import pipeline

    opened = pipeline.open_pipeline(_WORKDIR.value, inpainting=True)
    if _RESOLUTION.value is not None:
        opened.sizes().check_resolution(_RESOLUTION.value, "--resolution=")
    resolution = _RESOLUTION.value or opened.resolution
    if resolution is None:
        raise UserError(
            f"--workdir={opened.name} does not state the size of its images; give --resolution."
        )
    return opened.load(), resolution


def make_scorer(model: "Model", settings: "Settings") -> "CandidateScorer":
    """Returns the scorer of candidates."""
    from focusdpo_jax.disruption.selection import CandidateScorer, patch_encoder
    from focusdpo_jax.vision import encoders

    batch_size = settings.batch_size
    encode = patch_encoder(model, batch_size)
    if _DINOV2.value:
        encode = encoders.load_dino("dinov2", _DINOV2.value, batch_size)[1]
    return CandidateScorer(
        encode, encoders.load_clip(_CLIP.value, batch_size) if _CLIP.value else None
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["manifest", "output"])
    command.run(main, resumable=True)
