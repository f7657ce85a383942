"""The model card (README.md) of exported weights: content, training, and how to load them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from focusdpo_jax import objectives

# Statements before the pipeline, its arguments, and statements after it, for each exported part.
_BEFORE = {
    "unet": 'unet = UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet")',
    "adapter": "encoder = CLIPVisionModelWithProjection.from_pretrained(ENCODER)",
}
_ARGUMENTS = {"unet": "unet=unet", "adapter": "image_encoder=encoder"}
_AFTER = {
    "adapter": (
        'pipe.load_ip_adapter(FOLDER, subfolder="", '
        'weight_name="ip_adapter.safetensors",\n'
        "                     image_encoder_folder=None)"
    ),
    "lora": "pipe.load_lora_weights(FOLDER)",
}
_TAGS = {"adapter": "ip-adapter", "lora": "lora"}


def render(
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    names: Sequence[str],
    whole: bool,
    caveat: str | None = None,
) -> str:
    """Returns the model card as Markdown.

    Args:
      run: configuration of the run.
      metrics: last value of each metric; "step" is the step of the newest line.
      names: the exported parts of the generator, and "lora".
      whole: whether the folder is a complete pipeline.
      caveat: why diffusers misreads the adapter (`ip_adapter.diffusers_mismatch`), or None.
    """
    objective = objectives.get(run["objective"]).title
    base = run["model"]["pretrained"] or "random weights"
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags:",
        "- focusdpo",
        *(f"- {_TAGS[name]}" for name in names if name in _TAGS),
        "---",
        "",
        f"# {objective}, {run['trainable']}",
        "",
        f"Trained by focusdpo_jax for {metrics.get('step', run['steps'])} of {run['steps']} "
        f"steps from `{base}`. Here: {', '.join(f'`{name}`' for name in names)}.",
        "",
        "## Loading",
        "",
        "```python",
    ]
    lines += _loading(names, whole)
    lines += [
        "```",
        "",
        "FOLDER is this folder"
        + ("" if whole else ", BASE the pipeline that training started from")
        + (", ENCODER the folder of its image encoder" if "adapter" in names and not whole else "")
        + ".",
    ]
    if whole or "unet" in names:
        kept = run.get("dtype", "float32")
        lines[-1] += (
            " All weights are float32"
            + (f", though the run computed in {kept}" if kept != "float32" else "")
            + "; with `torch_dtype=torch.bfloat16`, given to every `from_pretrained`, they are loaded at "
            "half the memory."
        )
    if caveat:
        lines += [
            "",
            f"**`ip_adapter.safetensors` is not for diffusers:** {caveat}, which "
            "`load_ip_adapter` cannot know. focusdpo_jax reads it.",
        ]
    data = run["data"]
    rendered = data.get("source", "toybox") == "toybox"
    lines += [
        "",
        "## Data",
        "",
        f"{data['train_size']} pairs of `{data['path']}`, seed {data['seed']}."
        if rendered
        else f"Pairs of `{data['path']}`.",
        "",
        "## Last metrics",
        "",
        "| metric | value |",
        "| --- | --- |",
    ]
    lines += [
        f"| {name} | {value:.6g} |"
        for name, value in sorted(metrics.items())
        if isinstance(value, (int, float)) and name != "step" and "/" not in name
    ]
    lines += [
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(run, indent=2, sort_keys=True),
        "```",
        "",
    ]
    return "\n".join(lines)


def _loading(names: Sequence[str], whole: bool) -> list[str]:
    """The lines of code that load the exported parts."""
    # A complete pipeline contains its UNet and its image encoder.
    parts = [name for name in _BEFORE if name in names and not whole]
    arguments = ["FOLDER" if whole else "BASE", *(_ARGUMENTS[name] for name in parts)]
    return [
        *(_BEFORE[name] for name in parts),
        f"pipe = StableDiffusionXLPipeline.from_pretrained({', '.join(arguments)})",
        *(text for name, text in _AFTER.items() if name in names),
    ]
