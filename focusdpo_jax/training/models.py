"""The model of a run: read before training, written after it."""

import dataclasses
import functools
import importlib.resources

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from flax import traverse_util

from focusdpo_jax import config as config_rules
from focusdpo_jax.checkpoints import model_folder, pretrained, single_file
from focusdpo_jax.data import toybox
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.generator import PARTS, TRAINABLE, Generator, GeneratorConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig
from focusdpo_jax.models.tokenizer import Tokenizer
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes, rules

# For programs that run seldom: compiling them well would take longer than running them badly.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator with its parameters, and what else lies in its folder.

    Attributes:
      generator: the functions.
      parameters: {part: tree} of every part, in the types of `stored_type`.
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


def stored_type(config, path, shape):
    """The type in which a parameter is kept.

    What is trained is float32, and so is all of a float32 model. In a bfloat16 model the rest is
    bfloat16, but for vectors: norms use theirs in float32, and they take no room.

    Args:
      config: the run's; `dtype` and `trainable` matter.
      path: of the parameter, from its part on.
    """
    if config.dtype == "float32" or len(shape) < 2 or TRAINABLE[config.trainable](path):
        return jnp.float32
    return jnp.bfloat16


def load_model(config, place=None):
    """Reads `config.model.pretrained`, or makes a model of `config.model.sizes` at random.

    What is read is a model folder, as runs leave it, or SDXL in the layouts of `pretrained`.
    Parts that the files lack are drawn from `config.seed`, and so are the low-rank updates of
    LoRA that `config.model.lora_rank` asks for where there are none. Updates that lie in the folder
    are read, whether the configuration speaks of them or not.

    Args:
      place: (path of a parameter from its part on, shape) -> sharding; None keeps on the host what
        is read.

    Raises:
      UserError: the folder or one of its files is missing, damaged or of other sizes.
    """
    config = config_rules.complete(config)
    source = _locate(config)
    sizes = source.config() if source else GeneratorConfig.from_dict(config.model.sizes.to_dict())
    stored, wanted = sizes.unet.lora_rank, config.model.lora_rank
    if wanted and stored and wanted != stored:
        raise UserError(f"config.model.lora_rank = {wanted}: "
                        f"{source.path if source else 'config.model.sizes'} has low-rank updates "
                        f"of rank {stored}; give {stored}, or start from a model without updates.")
    sizes = dataclasses.replace(sizes, unet=dataclasses.replace(
        sizes.unet, lora_rank=wanted or stored, remat=config.model.remat))
    generator = Generator(sizes, jnp.dtype(config.dtype))

    parameters = {}
    for number, part in enumerate(PARTS):
        init = functools.partial(generator.init_part, part)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        shapes = traverse_util.flatten_dict(jax.eval_shape(init, key))
        types = {path: stored_type(config, (part, *path), leaf.shape)
                 for path, leaf in shapes.items()}
        published = {p: v for p, v in shapes.items()
                     if stored or p[-1] not in ("lora_a", "lora_b")}
        shardings = {path: place and place((part, *path), leaf.shape)
                     for path, leaf in shapes.items()}
        tree = source and source.load_part(
            part, traverse_util.unflatten_dict(published), config=sizes,
            dtype=traverse_util.unflatten_dict(types),
            sharding=place and traverse_util.unflatten_dict(shardings))
        flat = {} if tree is None else traverse_util.flatten_dict(tree)
        missing = sorted(shapes.keys() - flat.keys())
        if missing:
            logging.info("%s: %s at random", part, "made" if tree is None else "LoRA made")
            flat |= _draw(init, key, missing, types, shardings)
        parameters[part] = traverse_util.unflatten_dict({path: flat[path] for path in shapes})
    length = sizes.text_encoder.max_length
    if source is None:
        return Model(generator, parameters, Tokenizer.of_words(toybox.vocabulary(), length), None)
    return Model(generator, parameters, Tokenizer(source.tokenizer, length),
                 model_folder.load_part(source.path, "probe"))


def abstract_model(config, mesh):
    """The generator of a configuration, and its parameters as shapes with shardings.

    Where `config.model.pretrained` is not on this machine the sizes are SDXL's, with IP-Adapter-Plus.
    """
    config = config_rules.complete(config)
    try:
        source = _locate(config)
        sizes = source.config() if source else GeneratorConfig.from_dict(
            config.model.sizes.to_dict())
    except UserError as error:
        logging.warning("%s Planning for SDXL.", str(error).partition(". ")[0] + ".")
        sizes = GeneratorConfig(**single_file.SDXL, image_encoder=CLIPVisionConfig(),
                                adapter=SubjectAdapterConfig())
    sizes = dataclasses.replace(sizes, unet=dataclasses.replace(
        sizes.unet, lora_rank=config.model.lora_rank or sizes.unet.lora_rank,
        remat=config.model.remat))
    generator = Generator(sizes, jnp.dtype(config.dtype))
    parameters = {}
    for part in PARTS:
        shapes = traverse_util.flatten_dict(jax.eval_shape(
            functools.partial(generator.init_part, part), jax.random.key(0)))
        parameters[part] = traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(
            leaf.shape, stored_type(config, (part, *path), leaf.shape),
            sharding=rules.parameter_sharding((part, *path), leaf.shape, mesh))
            for path, leaf in shapes.items()})
    return generator, parameters


def load_probe(config):
    """Parameters of Toybox's probe beside `config.model.pretrained`, or None where there is none.

    Raises:
      UserError: as `load_model`.
    """
    source = _locate(config_rules.complete(config))
    return source and model_folder.load_part(source.path, "probe")


def _locate(config):
    """The files that a complete configuration names; None where its weights are random."""
    if not config.model.pretrained:
        return None
    fields = ("pretrained", "adapter", "image_encoder", "tokenizer")
    return pretrained.locate({field: config.model[field] for field in fields}, shipped)


def _draw(init, key, paths, types, shardings):
    """The parameters {path: array} of `paths` that `init` draws."""
    def draw(key):
        # Of what is not returned nothing is computed.
        flat = traverse_util.flatten_dict(init(key))
        return {path: flat[path].astype(types[path]) for path in paths}

    return jax.jit(draw, out_shardings={path: shardings[path] for path in paths},
                   compiler_options=FAST_TO_COMPILE)(key)


def save_model(folder, model, parameters, probe=None):
    """Writes a model folder that `load_model` reads back: `parameters` in the place of the old."""
    folder = epath.Path(folder)
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
    for part, tree in parameters.items():
        tree = meshes.fetch(tree)
        if processes.is_first():
            model_folder.save_part(folder, part, tree)
    if not processes.is_first():
        return
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
