"""Exports a run to files that diffusers, and tools built on its layouts, load.

README.md                               model card
ip_adapter.safetensors                  for pipe.load_ip_adapter
pytorch_lora_weights.safetensors        for pipe.load_lora_weights
unet/                                   for UNet2DConditionModel.from_pretrained
...                                     the other parts (see diffusers_folder), with --whole
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath

from focusdpo_jax import objectives
from focusdpo_jax.checkpoints import (
    diffusers_folder,
    ip_adapter,
    lora,
    model_card,
    model_folder,
    run_folder,
)
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import cannot_write, replace_file
from focusdpo_jax.models import vocabulary
from focusdpo_jax.models.generator import PARTS, Generator
from focusdpo_jax.models.generator_config import GeneratorConfig
from focusdpo_jax.models.parameters import Params
from focusdpo_jax.models.tokenizer import Tokenizer

LORA = "lora"
# The parts that each value of config.trainable changes.
_TRAINED = {
    "adapter": ("adapter",),
    "lora": (LORA,),
    "full": ("unet", "adapter"),
    "generator": ("unet", "adapter", "text_encoder", "text_encoder_2"),
}


class _Model(Protocol):
    """A model in memory, such as `training.models.Model`."""

    @property
    def generator(self) -> Generator: ...

    @property
    def parameters(self) -> Params: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


def export_run(
    workdir: epath.PathLike,
    output: epath.PathLike,
    *,
    whole: bool = False,
    read_checkpoint: Callable[[], _Model] | None = None,
) -> tuple[str, ...]:
    """Writes the trained parts of a run from its newest weights (`run_folder.newest_weights`).

    Args:
      workdir: folder of the run.
      output: folder to write to; created if missing, files of the same names are replaced.
      whole: whether to write the other parts, too, so that the folder is a complete pipeline.
      read_checkpoint: returns the model of the newest checkpoint, for weights that are not in the
        run's `model/`; None raises a UserError for them.

    Returns:
      The names of the written parts, and "lora"; without the model card.

    Raises:
      UserError: the run has no weights yet or trained nothing to export, `output` cannot be
        written, or diffusers does not support a model of these sizes.
    """
    workdir, output = epath.Path(workdir), epath.Path(output)
    run, weights = run_folder.read_config(workdir), run_folder.newest_weights(workdir)
    if weights.folder is None:
        if read_checkpoint is None:
            raise UserError(
                f"--workdir={workdir}: the run's newest weights are in its checkpoint of step "
                f"{weights.step}, not in model/. Run the training's command again to its end."
            )
        model = read_checkpoint()
        config = model.generator.config
        tokenizer = model.tokenizer if whole else None
        read_part = functools.partial(_of_model, model.parameters)
    else:
        config = model_folder.load_config(weights.folder)
        tokenizer = (
            Tokenizer(
                weights.folder / "tokenizer",
                config.text_encoder.max_length,
                vocabulary.pad_tokens(weights.folder),
            )
            if whole
            else None
        )
        read_part = functools.partial(_part, weights.folder)
    objective = objectives.get(run["objective"])
    if isinstance(objective, objectives.EncoderObjective):
        names = objective.exports
    else:
        names = _TRAINED[run["trainable"]]
    if config.unet.lora_rank and ("unet" in names or whole):
        names = (*names, LORA)
    if whole:
        names = tuple(dict.fromkeys((*PARTS, *names)))
    if not names:
        raise UserError(
            f"--workdir={workdir}: a run of config.objective = {run['objective']!r} "
            "trains no part of a diffusers pipeline; add --whole for the generator"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write(read_part, output, names, config, run["resolution"])
        if tokenizer is not None:
            diffusers_folder.save_pipeline_files(output, config, tokenizer)
        caveat = ip_adapter.diffusers_mismatch(config.adapter) if "adapter" in names else None
        if caveat:
            logging.warning(
                "%s of %s: diffusers does not load it correctly",
                caveat,
                output / diffusers_folder.ADAPTER,
            )
        metrics = run_folder.last_metrics(workdir, weights.step)
        if weights.step is not None:
            metrics["step"] = weights.step
        card = model_card.render(run, metrics, names, whole, caveat)
        replace_file(output / "README.md", card)
    except OSError as error:
        raise cannot_write(f"--output={output}", error) from error
    logging.info(
        "%s written to %s%s",
        ", ".join(names),
        output,
        "" if weights.step is None else f": step {weights.step} of {run['steps']}",
    )
    return names


def _write(
    read_part: Callable[[str], Params],
    output: epath.Path,
    names: tuple[str, ...],
    config: GeneratorConfig,
    resolution: int,
) -> None:
    """Writes each of `names`; at most two parts are read at once from a folder."""
    for name in names:
        if name == LORA:
            lora.save(output, read_part("unet"), config.unet)
        elif name == "adapter":
            parameters = {part: read_part(part) for part in ("unet", "adapter")}
            diffusers_folder.save_adapter(output, parameters, config)
        else:
            diffusers_folder.save_part(output, name, read_part(name), config, resolution)


def _of_model(parameters: Params, name: str) -> Any:
    """Returns a part of a model in memory in float32, as `_part` does for a folder."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float32), parameters[name])


def _part(folder: epath.Path, name: str) -> dict[str, Any]:
    """Reads a part in float32.

    The run may have stored it in several types. Pipelines need a single type, and the trained
    parameters are float32.
    """
    tree = model_folder.load_part(folder, name, dtype=np.float32)
    if tree is None:
        raise UserError(
            f"{folder / name}.safetensors is missing; run the training's command again to write it."
        )
    return tree
