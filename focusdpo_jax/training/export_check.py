"""Compares an image that diffusers generates from an export with one of the run: `export --check`.

Diffusers loads the files as their model card describes; this package uses the run's own model.
Noise, prompt, reference, scheduler and number of steps are the same, and both use float32. No other
module of the package imports PyTorch and diffusers.
"""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Collection
from typing import Any, cast

import jax
import numpy as np
from etils import epath

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.checkpoints import diffusers_folder, ip_adapter, run_export
from focusdpo_jax.errors import UserError
from focusdpo_jax.inference.generate import make_generate, scene_noise
from focusdpo_jax.models.generator import PARTS, merge_parameters, split_parameters
from focusdpo_jax.training import runs

LARGEST, MEAN = 2, 0.1
"""Largest differences that rounding may cause, at one position and in the mean, in 1/255."""

_PROMPT, _STEPS, _SEED = "a star on grass", 4, 0
_NEEDS = (
    "--check generates with diffusers, which needs PyTorch and, for LoRA, PEFT; {} is not "
    "installed here: pip install -e '.[test]', or leave --check out."
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Absolute differences of two images, in 1/255.

    Attributes:
      largest, mean: over all values.
      reference: whether the image adapter was used.
    """

    largest: int
    mean: float
    reference: bool


def check(
    workdir: epath.PathLike, output: epath.PathLike, names: Collection[str], *, whole: bool
) -> Difference:
    """Generates one image with diffusers and one with this package, and compares them.

    Args:
      workdir: folder of the run.
      output: folder of its export.
      names: the parts that were written, as `run_export.export_run` returns them.
      whole: whether the folder is a complete pipeline. For other exports the remaining parts are
        those of the run's base model.

    Raises:
      UserError: a package is missing, diffusers cannot open or use the files, they contain nothing
        that can be tested, or the images differ by more than `LARGEST` somewhere or `MEAN` on
        average.
    """
    require_packages(names)
    run = runs.Run(workdir)
    run.config = dataclasses.replace(run.config, dtype="float32")
    model, base = run.policy(), None
    config = model.generator.config
    reads = "adapter" in names and ip_adapter.diffusers_mismatch(config.adapter) is None
    if not reads and not whole and set(names) <= {"adapter"}:
        raise UserError(
            f"--check: {ip_adapter.diffusers_mismatch(config.adapter)}, so that diffusers cannot "
            f"use {epath.Path(output) / diffusers_folder.ADAPTER}: there is nothing to check"
        )
    if not whole:
        # Parts that were not trained come from the base: a bfloat16 run has rounded them.
        base = run.base()
        trained, _ = split_parameters(model.parameters, run.config.trainable)
        _, rest = split_parameters(base.parameters, run.config.trainable)
        model = model.with_parameters(merge_parameters(trained, rest))
    resolution = run.config.resolution
    noise = scene_noise(_SEED, [0], model.generator.latent_shape(resolution))
    size = config.image_encoder.image_size
    reference = _test_image(size) if reads else None
    # diffusers guides an adapter without a blank image differently (docs/checkpoints.md).
    guidance = 1.0 if reads and config.adapter.dropped == "absent" else 4.0
    with tempfile.TemporaryDirectory() as scratch:
        if base is not None:
            _write_base(epath.Path(scratch), base, config, resolution)
        pipe = _open(
            epath.Path(output), epath.Path(scratch) if base else epath.Path(output), names, reads
        )
        theirs = _generate_with_diffusers(
            pipe, output, np.asarray(noise), reference, resolution, guidance
        )
    generate = make_generate(
        model.generator, steps=_STEPS, guidance=guidance, negative_token_ids=model.tokenizer("")
    )
    shown = np.full((size, size, 3), 255, np.uint8) if reference is None else reference
    view = jax.jit(model.generator.encode_reference)(
        model.parameters, shown[None, None] / np.float32(255)
    )
    ours = np.asarray(
        generate(
            model.parameters,
            model.tokenizer(_PROMPT)[None],
            np.array([[resolution, resolution, 0, 0, resolution, resolution]], np.float32),
            view,
            np.array([[reads]]),
            noise,
        )
    )[0]
    apart = np.abs(ours.astype(np.int32) - theirs)
    found = Difference(int(apart.max()), float(apart.mean()), reads)
    if found.largest > LARGEST or found.mean > MEAN:
        raise UserError(
            f"--check: diffusers generates another image from {output} than the run: one image "
            f"differs by up to {found.largest}/255, {found.mean:.3g}/255 in the mean; "
            f"rounding causes up to {LARGEST}/255 and {MEAN}/255. The files do not have "
            "the trained weights, or diffusers reads them differently: export again, and report it "
            "if the error persists."
        )
    return found


def require_packages(names: Collection[str] = ()) -> None:
    """Raises UserError if a package is missing that checking an export of `names` needs."""
    for package in ("torch", "diffusers", *(("peft",) if run_export.LORA in names else ())):
        if importlib.util.find_spec(package) is None:
            raise UserError(_NEEDS.format(package))


def _test_image(size: int) -> RGBImage:
    """Returns a test image of a few colours, uint8 [size, size, 3], the same at every call."""
    rng = np.random.default_rng(_SEED)
    cells = rng.integers(0, 256, (4, 4, 3), np.uint8)
    side = -(-size // 4)
    return np.repeat(np.repeat(cells, side, 0), side, 1)[:size, :size]


def _open(output: epath.Path, base: epath.Path, names: Collection[str], reads: bool) -> Any:
    """Opens the pipeline as its model card describes; `base` is `output` if that is complete."""
    import diffusers
    import transformers

    lazy = cast(Any, diffusers)  # It imports its classes at the first access.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        parts = (
            {}
            if base == output or "unet" not in names
            else {"unet": lazy.UNet2DConditionModel.from_pretrained(output, subfolder="unet")}
        )
        pipe = lazy.StableDiffusionXLPipeline.from_pretrained(base, **parts)
        if reads:
            pipe.load_ip_adapter(
                output,
                subfolder="",
                weight_name=diffusers_folder.ADAPTER,
                image_encoder_folder=None,
            )
        if run_export.LORA in names:
            pipe.load_lora_weights(output)
    except Exception as error:  # Diffusers does not document the exceptions of its loaders.
        raise UserError(
            f"--check: diffusers {diffusers.__version__} cannot open {output}: {_line(error)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write_base(folder: epath.Path, base: Any, config: Any, resolution: int) -> None:
    """Writes the run's base model as a pipeline without image adapter and LoRA.

    Scheduler and tokenizers are those of the trained model, whose configuration is `config`.
    """
    for part in PARTS:
        if part != "adapter":
            diffusers_folder.save_part(
                folder, part, base.parameters[part], base.generator.config, resolution
            )
    diffusers_folder.save_pipeline_files(folder, config, base.tokenizer)


def _generate_with_diffusers(
    pipe: Any,
    output: epath.PathLike,
    noise: np.ndarray,
    reference: RGBImage | None,
    resolution: int,
    guidance: float,
) -> np.ndarray:
    """Generates an image with a diffusers pipeline, int32 [H, W, 3]."""
    import diffusers
    import torch
    from PIL import Image

    shown = {} if reference is None else {"ip_adapter_image": Image.fromarray(reference)}
    try:
        with torch.no_grad():
            image = pipe(
                _PROMPT,
                **shown,
                height=resolution,
                width=resolution,
                num_inference_steps=_STEPS,
                guidance_scale=guidance,
                output_type="np",
                latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
            ).images[0]
    except Exception as error:
        raise UserError(
            f"--check: diffusers {diffusers.__version__} opens {output}, but cannot generate an "
            f"image with it: {_line(error)}"
        ) from error
    return np.round(image * 255).astype(np.int32)


def _line(error: Exception) -> str:
    """Formats an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def describe(found: Difference, names: Collection[str]) -> str:
    """Formats a `Difference` within the limits as one line, for an export of `names`."""
    left_out = (
        ""
        if found.reference or "adapter" not in names
        else (f" ({diffusers_folder.ADAPTER} is not readable by diffusers and was not used)")
    )
    how = "with" if found.reference else "without"
    return (
        f"checked: diffusers generates the same image {how} a reference{left_out}, "
        f"largest difference {found.largest}/255, mean {found.mean:.3g}/255"
    )
