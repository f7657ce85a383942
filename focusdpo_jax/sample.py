"""Generates images of your subjects from a prompt and one to three reference images.

    python -m focusdpo_jax.sample --workdir=base --prompt="a star and a ball on grass" \\
        --reference=star.png:"a star" --reference=ball.png:"a ball" --output=out.png

Several prompts: --prompts=FILE, one JSON object per line, {"prompt": ..., "references": [...]}.
"""

import dataclasses
import json
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from etils import epath

from focusdpo_jax import command
from focusdpo_jax.errors import UserError

if TYPE_CHECKING:
    from focusdpo_jax.array_types import RGBImage
    from focusdpo_jax.inference.prompts import Prompt
    from focusdpo_jax.models.generator import GeneratorConfig
    from focusdpo_jax.training.models import Model

_WORKDIR = flags.DEFINE_string(
    "workdir",
    "base",
    "Folder of a run, or a model: a run's model/, a pipeline of diffusers such "
    "as export --whole writes, or base, the small Toybox generator that ships with the package.",
)
_PROMPT = flags.DEFINE_string(
    "prompt",
    None,
    "Text prompt, with every subject. A model reads a limited number of tokens (SDXL 77, "
    "base 16); a warning lists the text that is cut off.",
)
_REFERENCES = flags.DEFINE_multi_string(
    "reference",
    [],
    "Image of a subject, as PATH:PHRASE (a.png:a star); give one for each "
    "subject, in the order of the prompt. PATH:PHRASE@x0,y0,x1,y1 (shares of width and height) or "
    "PATH:PHRASE@MASK.png restricts it to a region of the generated image, and a final *0.7 sets "
    "its weight. Images and masks are read as by prepare (docs/data.md): transparent "
    "parts count as white, so that a cut-out shows the subject alone, and are black in a mask.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "File of JSON lines, many prompts at once: prompt, references (texts as for "
    "--reference, or objects with path, phrase, box, mask, scale), seed.",
)
_NEGATIVE = flags.DEFINE_string(
    "negative_prompt", "", "Text prompt to avoid; needs --guidance above 1."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "sample.png",
    "The image; for several, a folder for 0000.png and so on, and all.png.",
)
_COMPARE = flags.DEFINE_boolean(
    "compare",
    False,
    "Also generate with the model that the run started from, from the same noise; the "
    "grid shows references, base and policy side by side.",
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Images of each prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the first image; image i of a prompt has seed + i. In a file of --prompts, line i "
    "starts at seed + i, unless it has a seed of its own.",
)
_STEPS = flags.DEFINE_integer("steps", 30, "Denoiser calls.", lower_bound=1)
_SAMPLER = flags.DEFINE_string(
    "sampler", "ddim", "ddim, euler, euler_a (adds noise at every step) or dpmpp_2m (fewer steps)."
)
_GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Classifier-free guidance scale; 1 or less disables guidance (as 0 in diffusers): one "
    "conditional pass per step. Default: the run's, 4 for the models of this package, 5 for others.",
)
_IMAGE_SCALE = flags.DEFINE_float("image_scale", 1.0, "Weight of the references.", lower_bound=0)
_RESOLUTION = flags.DEFINE_integer(
    "resolution", None, "Side of the images in pixels. Default: the run's."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images generated at once.", lower_bound=1)


def main() -> None:
    """Reads the flags and runs `inference.sampler.Sampler`."""
    from focusdpo_jax.inference import prompts
    from focusdpo_jax.inference.sampler import Sampler
    from focusdpo_jax.models import truncation

    wanted = read_wanted(prompts)
    check_output(len(wanted))
    model, base, settings = open_models()
    settings |= {
        "steps": _STEPS.value,
        "sampler": _SAMPLER.value,
        "image_scale": _IMAGE_SCALE.value,
    }
    for flag in (_GUIDANCE, _RESOLUTION):
        if flag.value is not None:
            settings[flag.name] = flag.value
    if "resolution" not in settings:
        raise UserError(
            f"--workdir={_WORKDIR.value} does not state the size of its images; give --resolution."
        )
    sampler = Sampler(
        model,
        slots=max(1, *(len(p.references) for p in wanted)),
        negative=_NEGATIVE.value,
        batch_size=min(_BATCH_SIZE.value, len(wanted)),
        **settings,
    )
    texts = [(prompt.text, [r.phrase for r in prompt.references]) for prompt in wanted]
    truncation.warn(
        model.tokenizer,
        texts,
        "--prompt" if _PROMPT.value is not None else f"--prompts={_PROMPTS.value}",
    )
    truncation.warn(model.tokenizer, [(_NEGATIVE.value, ())], "--negative_prompt")
    if _NEGATIVE.value and settings["guidance"] <= 1:
        logging.warning(
            "--negative_prompt has no effect: guidance is %s, which is disabled at 1 or less",
            settings["guidance"],
        )
    policy = list(sampler.draw(wanted))
    settings |= {"workdir": _WORKDIR.value, "negative_prompt": _NEGATIVE.value}
    write(wanted, policy, list(sampler.draw(wanted, base.parameters)) if base else None, settings)


def read_wanted(prompts: ModuleType) -> "list[Prompt]":
    """Returns a prompt for every image to generate.

    Args:
      prompts: the module `inference.prompts`, imported after the flags are parsed.
    """
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        raise UserError("give --prompt, or --prompts with a file of several.")
    references = tuple(prompts.parse_reference(text) for text in _REFERENCES.value)
    if _PROMPTS.value is not None:
        listed = prompts.read_prompts(_PROMPTS.value, references, _SEED.value)
    else:
        listed = [prompts.Prompt(_PROMPT.value, references, _SEED.value)]
    return [
        dataclasses.replace(prompt, seed=prompt.seed + i)
        for prompt in listed
        for i in range(_SAMPLES.value)
    ]


def check_output(count: int) -> None:
    """Checks that --output can be a file for one image, or a folder for several."""
    output = epath.Path(_OUTPUT.value)
    if count > 1 and output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; give a folder for {count} images.")
    if count == 1 and output.is_dir():
        raise UserError(f"--output={output} is a folder; give the name of an image for one image.")


def open_models() -> "tuple[Model, Model | None, dict[str, Any]]":
    """Returns the model, the base model for --compare or None, and default sampler settings."""
    from focusdpo_jax import pipeline

    opened = pipeline.open_pipeline(_WORKDIR.value)
    if _COMPARE.value and opened.run is None:
        raise UserError(
            f"--workdir={opened.name} is a model and not a run: --compare has nothing to compare "
            "it with."
        )
    check_resolution(opened.sizes)
    base = opened.run.base() if opened.run and _COMPARE.value else None
    settings = {"guidance": 4.0 if opened.shipped else 5.0}
    if opened.config:
        settings = {"guidance": opened.config.sampling.guidance}
    if opened.resolution:
        settings["resolution"] = opened.resolution
    return opened.load(), base, settings


def check_resolution(sizes: "Callable[[], GeneratorConfig]") -> None:
    """Checks --resolution against the `GeneratorConfig` from `sizes`, before weights are read."""
    if _RESOLUTION.value is not None:
        sizes().check_resolution(_RESOLUTION.value, "--resolution=")


def write(
    wanted: "list[Prompt]",
    policy: "list[RGBImage]",
    base: "list[RGBImage] | None",
    settings: dict[str, Any],
) -> None:
    """Writes the images with settings as metadata; for several or a comparison, also a grid."""
    from focusdpo_jax.inference import prompts
    from focusdpo_jax.visualization import grids

    output = epath.Path(_OUTPUT.value)
    rows = [
        grids.SampleRow(
            caption=f"{prompt.text} (seed {prompt.seed})",
            references=[prompts.load_reference(r.path, len(image)) for r in prompt.references],
            generated=image,
            base=None if base is None else base[i],
        )
        for i, (prompt, image) in enumerate(zip(wanted, policy, strict=True))
    ]

    def text(prompt):
        return {"focusdpo_jax": json.dumps({**dataclasses.asdict(prompt), **settings})}

    scale = max(1, 128 // len(policy[0]))
    if len(wanted) == 1:
        image = policy[0] if base is None else grids.sample_grid(rows, scale=scale)
        grids.save_png(output, image, text(wanted[0]))
        logging.info("%s", output)
        return
    for i, (prompt, image) in enumerate(zip(wanted, policy, strict=True)):
        grids.save_png(output / f"{i:04d}.png", image, text(prompt))
        if base is not None:
            grids.save_png(output / f"{i:04d}_base.png", base[i], text(prompt))
    grids.save_png(output / "all.png", grids.sample_grid(rows, scale=scale))
    logging.info("%d images and all.png in %s", len(wanted), output)


if __name__ == "__main__":
    command.run(main)
