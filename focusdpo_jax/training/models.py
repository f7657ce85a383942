"""The model of a run: read before training, written after it."""

import dataclasses
import functools
import importlib.resources

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util

from focusdpo_jax.checkpoints import diffusers_folder, model_folder
from focusdpo_jax.data import toybox
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.generator import PARTS, Generator, GeneratorConfig
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary

# For programs that run seldom: compiling them well would take longer than running them badly.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator with its parameters, and what else lies in its folder.

    Attributes:
      generator: the functions.
      parameters: {part: tree} of every part, float32 arrays.
      tokenizer: captions to token ids.
      probe: parameters of Toybox's probe, or None where the folder has none.
    """

    generator: Generator
    parameters: dict
    tokenizer: Tokenizer
    probe: dict | None

    def with_parameters(self, parameters):
        """The same model with other parameters."""
        return dataclasses.replace(self, parameters=parameters)


def shipped(name):
    """The folder of a model that comes with the package."""
    return epath.Path(importlib.resources.files("focusdpo_jax") / "assets" / name)


def _locate(name):
    """The folder that `config.model.pretrained` stands for, and the module that reads it."""
    folder = shipped(name)
    if "/" in name or not folder.exists():
        try:
            folder = diffusers_folder.locate(name)
        except UserError as error:
            reason = str(error).removeprefix(f"{name}: ")
            raise UserError(f"config.model.pretrained = {name!r}: {reason} (Or give 'toybox', "
                            "which ships with this package.)") from error
    return folder, diffusers_folder if diffusers_folder.is_one(folder) else model_folder


def load_model(config, workdir):
    """Reads `config.model.pretrained`, or makes a model of `config.model.sizes` at random.

    What is read is a model folder, as runs leave it, or an SDXL pipeline in diffusers' layout.
    Parts that the folder lacks, and the low-rank updates of LoRA, are drawn from `config.seed`.

    Raises:
      UserError: the folder or one of its files is missing, damaged or of other sizes.
    """
    name = config.model.pretrained
    if name:
        folder, layout = _locate(name)
        sizes = layout.load_config(folder)
    else:
        folder, layout = epath.Path(workdir) / "model", model_folder
        sizes = GeneratorConfig.from_dict(config.model.sizes.to_dict())
        write_vocabulary(folder / "tokenizer", toybox.vocabulary())
    sizes = dataclasses.replace(
        sizes, unet=dataclasses.replace(sizes.unet, lora_rank=config.model.lora_rank))
    generator = Generator(sizes)

    parameters = {}
    for number, part in enumerate(PARTS):
        init = functools.partial(generator.init_part, part)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        paths = traverse_util.flatten_dict(jax.eval_shape(init, key))
        published = {p: v for p, v in paths.items() if p[-1] not in ("lora_a", "lora_b")}
        tree = layout.load_part(
            folder, part, traverse_util.unflatten_dict(published), dtype=np.float32)
        if tree is None or len(published) < len(paths):
            fresh = jax.jit(init, compiler_options=FAST_TO_COMPILE)(key)
            logging.info("%s: %s at random", part, "made" if tree is None else "LoRA made")
            if tree is not None:
                fresh = traverse_util.unflatten_dict(
                    traverse_util.flatten_dict(fresh) | traverse_util.flatten_dict(tree))
            tree = fresh
        parameters[part] = tree
    tokenizer = Tokenizer(folder / "tokenizer", sizes.text_encoder.max_length)
    return Model(generator, parameters, tokenizer, model_folder.load_part(folder, "probe"))


def save_model(folder, model, parameters, probe=None):
    """Writes a model folder that `load_model` reads back: `parameters` in the place of the old."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, tree in parameters.items():
        model_folder.save_part(folder, part, tree)
    probe = model.probe if probe is None else probe
    if probe is not None:
        model_folder.save_part(folder, "probe", probe)
    model.tokenizer.save(folder / "tokenizer")
    model_folder.save_config(folder, model.generator.config)
    logging.info("model written to %s", folder)


def describe(parameters):
    """One line a part: how many parameters it has."""
    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))
    return "parameters: " + ", ".join(
        f"{part} {count(tree) / 1e6:.2f} M" for part, tree in parameters.items())
