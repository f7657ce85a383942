"""Whether diffusers draws of an export what the run draws: `export --check`.

One image is drawn by diffusers, from the files as their model card says, and one here, by the run's own
model, from the same noise, prompt, reference, scheduler and steps, both in float32. PyTorch and diffusers are
imported here and nowhere else in the package.
"""

import dataclasses
import importlib.util
import tempfile

import jax
import numpy as np
from etils import epath

from focusdpo_jax.checkpoints import diffusers_folder, ip_adapter, run_export
from focusdpo_jax.errors import UserError
from focusdpo_jax.inference.generate import make_generate, scene_noise
from focusdpo_jax.models.generator import PARTS, merge_parameters, split_parameters
from focusdpo_jax.training import runs

LARGEST, MEAN = 2, 0.1
"""Of an image's values, in 1/255: what differs by more, at one place or in the mean, is no rounding."""

_PROMPT, _STEPS, _SEED = "a star on grass", 4, 0
_NEEDS = (
    "--check draws with diffusers, which needs PyTorch and, for LoRA, PEFT; {} is not installed here: "
    "pip install -e '.[test]', or leave --check out."
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two images, in 1/255.

    Attributes:
      largest, mean: of the absolute differences of all values.
      reference: whether the image adapter took part.
    """

    largest: int
    mean: float
    reference: bool


def check(workdir, output, names, *, whole):
    """Draws one image with diffusers and one here.

    Args:
      workdir: folder of the run.
      output: folder of its export.
      names: what was written, as `run_export.export_run` returns it.
      whole: whether the folder is a complete pipeline. Of other exports the rest is what the run started
        from.

    Returns:
      A `Difference`.

    Raises:
      UserError: a package is missing, diffusers cannot open or draw the files, they have nothing that can be
        drawn, or the images differ by more than `LARGEST` somewhere or `MEAN` in all.
    """
    require_packages(names)
    run = runs.Run(workdir)
    run.config = dataclasses.replace(run.config, dtype="float32")
    model, base = run.policy(), None
    config = model.generator.config
    reads = "adapter" in names and ip_adapter.unreadable(config.adapter) is None
    if not reads and not whole and set(names) <= {"adapter"}:
        raise UserError(
            f"--check: {ip_adapter.unreadable(config.adapter)}, so that diffusers cannot draw "
            f"with {epath.Path(output) / diffusers_folder.ADAPTER}: there is nothing to check"
        )
    if not whole:
        # What was not trained as the base has it: a bfloat16 run has rounded it.
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
        theirs = _draw_theirs(pipe, output, np.asarray(noise), reference, resolution, guidance)
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
            np.float32([[resolution, resolution, 0, 0, resolution, resolution]]),
            view,
            np.array([[reads]]),
            noise,
        )
    )[0]
    apart = np.abs(ours.astype(np.int32) - theirs)
    found = Difference(int(apart.max()), float(apart.mean()), reads)
    if found.largest > LARGEST or found.mean > MEAN:
        raise UserError(
            f"--check: diffusers draws of {output} something else than the run: one image "
            f"differs by up to {found.largest}/255, {found.mean:.3g}/255 in the mean; "
            f"rounding makes up to {LARGEST}/255 and {MEAN}/255. The files do not hold "
            "what was trained, or diffusers reads them otherwise: export again, and report it if "
            "it stays."
        )
    return found


def require_packages(names=()):
    """Raises a UserError where a package is missing that checking an export of `names` needs."""
    for package in ("torch", "diffusers", *(("peft",) if run_export.LORA in names else ())):
        if importlib.util.find_spec(package) is None:
            raise UserError(_NEEDS.format(package))


def _test_image(size):
    """uint8 [size, size, 3] of a few colours, the same at every call."""
    draw = np.random.default_rng(_SEED)
    cells = draw.integers(0, 256, (4, 4, 3), np.uint8)
    side = -(-size // 4)
    return np.repeat(np.repeat(cells, side, 0), side, 1)[:size, :size]


def _open(output, base, names, reads):
    """The pipeline, opened as the model card says (`model_card`); `base` is `output` where that is whole."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        parts = (
            {}
            if base == output or "unet" not in names
            else {"unet": diffusers.UNet2DConditionModel.from_pretrained(output, subfolder="unet")}
        )
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base, **parts)
        if reads:
            pipe.load_ip_adapter(
                output,
                subfolder="",
                weight_name=diffusers_folder.ADAPTER,
                image_encoder_folder=None,
            )
        if run_export.LORA in names:
            pipe.load_lora_weights(output)
    except Exception as error:  # What diffusers raises over files is not documented.
        raise UserError(
            f"--check: diffusers {diffusers.__version__} cannot open {output}: {_line(error)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write_base(folder, base, config, resolution):
    """Writes the model that a run started from as a pipeline without image adapter and LoRA.

    Scheduler and tokenizers are written as those of the trained model, whose configuration is `config`.
    """
    for part in PARTS:
        if part != "adapter":
            diffusers_folder.save_part(
                folder, part, base.parameters[part], base.generator.config, resolution
            )
    diffusers_folder.save_surroundings(folder, config, base.tokenizer)


def _draw_theirs(pipe, output, noise, reference, resolution, guidance):
    """int32 [H, W, 3] of a pipeline."""
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
            f"--check: diffusers {diffusers.__version__} opens {output}, but cannot draw with "
            f"it: {_line(error)}"
        ) from error
    return np.round(image * 255).astype(np.int32)


def _line(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def describe(found, names):
    """One line about a `Difference` that is small enough, of an export of `names`."""
    left_out = (
        ""
        if found.reference or "adapter" not in names
        else (f" ({diffusers_folder.ADAPTER} is not for diffusers and took no part)")
    )
    how = "with" if found.reference else "without"
    return (
        f"checked: diffusers draws the same image {how} a reference{left_out}, "
        f"largest difference {found.largest}/255, mean {found.mean:.3g}/255"
    )
