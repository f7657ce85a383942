"""The result of a run, as files that diffusers and tools built on its layouts load.

README.md                               model card
ip_adapter.safetensors                  of pipe.load_ip_adapter
pytorch_lora_weights.safetensors        of pipe.load_lora_weights
unet/                                   of UNet2DConditionModel.from_pretrained
...                                     the other parts (see diffusers_folder), where asked for
"""

import functools

import jax
import numpy as np
from absl import logging
from etils import epath

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
from focusdpo_jax.models.generator import PARTS
from focusdpo_jax.models.tokenizer import Tokenizer

LORA = "lora"
# What each value of config.trainable changes.
_TRAINED = {
    "adapter": ("adapter",),
    "lora": (LORA,),
    "full": ("unet", "adapter"),
    "generator": ("unet", "adapter", "text_encoder", "text_encoder_2"),
}
# Objectives that train something else, whatever config.trainable says.
_ENCODERS = {"autoencode": ("vae",), "attributes": ("image_encoder",), "probe": ()}


def export_run(workdir, output, *, whole=False, read_checkpoint=None):
    """Writes what a run has trained, as of its newest weights (`run_folder.newest_weights`).

    Args:
      workdir: folder of the run.
      output: folder to write to; created if missing, files of the same names are replaced.
      whole: whether to write the other parts, too, which makes a pipeline of the folder.
      read_checkpoint: () -> the model of the newest checkpoint (generator, parameters, tokenizer), for
        weights that are not in the run's `model/`; without it they are refused.

    Returns:
      The names that were written, without the model card: parts, and "lora".

    Raises:
      UserError: the run has no weights yet or trained nothing to export, `output` cannot be written,
        or diffusers has no model of these sizes.
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
        config, tokenizer = model.generator.config, model.tokenizer
        read_part = functools.partial(_of_model, model.parameters)
    else:
        config = model_folder.load_config(weights.folder)
        tokenizer = (
            Tokenizer(
                weights.folder / "tokenizer",
                config.text_encoder.max_length,
                vocabulary.fillers(weights.folder),
            )
            if whole
            else None
        )
        read_part = functools.partial(_part, weights.folder)
    names = _ENCODERS.get(run["objective"], _TRAINED[run["trainable"]])
    if config.unet.lora_rank and ("unet" in names or whole):
        names = (*names, LORA)
    if whole:
        names = tuple(dict.fromkeys((*PARTS, *names)))
    if not names:
        raise UserError(
            f"--workdir={workdir}: a run of config.objective = {run['objective']!r} "
            "trains nothing that diffusers knows; add --whole for the generator"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write(read_part, output, names, config, run["resolution"])
        if whole:
            diffusers_folder.save_surroundings(output, config, tokenizer)
        caveat = ip_adapter.unreadable(config.adapter) if "adapter" in names else None
        if caveat:
            logging.warning(
                "%s of %s: diffusers loads it as something else",
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


def _write(read_part, output, names, config, resolution):
    """Writes each of `names`; from a folder no more than two parts are read at once."""
    for name in names:
        if name == LORA:
            lora.save(output, read_part("unet"), config.unet)
        elif name == "adapter":
            parameters = {part: read_part(part) for part in ("unet", "adapter")}
            diffusers_folder.save_adapter(output, parameters, config)
        else:
            diffusers_folder.save_part(output, name, read_part(name), config, resolution)


def _of_model(parameters, name):
    """A part of a model in memory, as `_part` reads it from a folder."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float32), parameters[name])


def _part(folder, name):
    """A part in float32, whatever mixture of types the run kept it in.

    Pipelines need one type, and what was trained is float32.
    """
    tree = model_folder.load_part(folder, name, dtype=np.float32)
    if tree is None:
        raise UserError(
            f"{folder / name}.safetensors is missing; run the training's command again to write it."
        )
    return tree
