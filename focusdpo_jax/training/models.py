"""Loads the model of a run before training, and writes it afterwards."""

import dataclasses
import functools
import hashlib
import importlib.resources

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from flax import traverse_util

from focusdpo_jax import compiling, objectives, toybox
from focusdpo_jax.checkpoints import (
    model_folder,
    pretrained,
    published,
    single_file,
    tensor_file,
)
from focusdpo_jax.errors import MissingFiles, UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import PARTS, TRAINABLE, Generator, GeneratorConfig
from focusdpo_jax.models.parameters import flatten
from focusdpo_jax.models.tokenizer import Tokenizer
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes, rules
from focusdpo_jax.toybox.probe import TOYBOX, Probe
from focusdpo_jax.training.part_shapes import part_shapes

# Fields of config.model that name files.
_FILES = ("pretrained", "adapter", "image_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator with its parameters, tokenizer and probe.

    Attributes:
      generator: the Generator.
      parameters: {part: tree} of every loaded part, in the types of `stored_type`.
      tokenizer: converts captions to token ids.
      probe: parameters of Toybox's probe, or None if the folder has none.
    """

    generator: Generator
    parameters: dict
    tokenizer: Tokenizer
    probe: dict | None

    def with_parameters(self, parameters):
        """Returns the model with other parameters."""
        return dataclasses.replace(self, parameters=parameters)


def shipped(name):
    """Returns the folder of a model that ships with the package; it may not exist."""
    return epath.Path(importlib.resources.files("focusdpo_jax") / "assets" / name)


def stored_type(config, path, shape):
    """Returns the type in which a parameter is stored.

    Trainable parameters and all parameters of a float32 model are float32. The frozen parameters of
    a bfloat16 model are bfloat16, except for the autoencoder's encoder, which computes in float32,
    and for vectors, which norms use in float32 and which need little memory.

    Args:
      config: the `RunConfig`; its `dtype` and `trainable` are read.
      path: path of the parameter, starting with its part.
      shape: shape of the parameter.
    """
    if (
        config.dtype == "float32"
        or stacking.is_vector(path, shape)
        or path[:2] in (("vae", "encoder"), ("vae", "quant_conv"))
        or TRAINABLE[config.trainable](path)
    ):
        return jnp.float32
    return jnp.bfloat16


def generator_config(config, *, inpainting=False):
    """Returns the `GeneratorConfig` of a configuration, from the configuration files of its model.

    Args:
      config: the `RunConfig`.
      inpainting: whether the UNet may have more input channels than the latents, as for inpainting.

    Raises:
      UserError: files are missing or damaged, parts do not fit together, or the UNet has more input
        channels than the latents.
    """
    sizes = _open(config)[1]
    if not inpainting:
        _require_latents_alone(config, sizes)
    return sizes


def load_model(config, place=None, *, inpainting=False):
    """Loads `config.model.pretrained`, or initialises a model of `config.model.sizes` at random.

    See `open_model` and `load_parts` for the arguments and errors.
    """
    model = open_model(config, inpainting=inpainting)
    return model.with_parameters(load_parts(config, PARTS, place))


def open_model(config, *, inpainting=False):
    """Returns the model of a configuration without the generator's parameters, which are not read.

    Args:
      config: the `RunConfig`.
      inpainting: whether the UNet may have more input channels than the latents, as for inpainting.

    Raises:
      UserError: the folder or one of its files is missing, damaged or of other sizes, the
        vocabulary does not fit the text encoders, or the UNet has more input channels than the
        latents.
    """
    source, sizes, _ = _open(config)
    if not inpainting:
        _require_latents_alone(config, sizes)
    generator = Generator(sizes, jnp.dtype(config.dtype))
    length = sizes.text_encoder.max_length
    if source is None:
        return Model(generator, {}, Tokenizer.of_words(toybox.vocabulary(), length), None)
    tokenizer = Tokenizer(source.tokenizer, length, source.pad_tokens)
    # The end-of-text token has the largest id of the vocabulary.
    words = int(tokenizer("").max()) + 1
    known = min(sizes.text_encoder.vocab_size, sizes.text_encoder_2.vocab_size)
    if words > known:
        raise UserError(
            f"{source.tokenizer} has a vocabulary of {words} tokens, and the text encoders have "
            f"{known}: set config.model.tokenizer to the one that they were trained with"
        )
    return Model(generator, {}, tokenizer, _read_probe(source.path))


def load_parts(config, parts, place=None):
    """Loads the parameters of some parts of the model of a configuration.

    The files are a model folder, as written by runs, or SDXL in the layouts of `pretrained`. Parts
    that the files lack are initialised at random from `config.seed`. So are the LoRA matrices of
    `config.model.lora_rank`, if the files have none. LoRA matrices in the files are always loaded.

    Args:
      config: the `RunConfig`.
      parts: names of PARTS.
      place: (path of a parameter, starting with its part; shape) -> sharding; None keeps the loaded
        arrays on the host.

    Returns:
      {part: tree}.

    Raises:
      UserError: the folder or one of its files is missing, damaged or of other sizes.
    """
    source, sizes, stored = _open(config)
    generator = Generator(sizes, jnp.dtype(config.dtype))
    parameters = {}
    for number, part in enumerate(PARTS):
        if part not in parts:
            continue
        init = functools.partial(generator.init_part, part)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        shapes = part_shapes(sizes, part)
        types = {
            path: stored_type(config, (part, *path), leaf.shape) for path, leaf in shapes.items()
        }
        shardings = {
            path: place and place((part, *path), leaf.shape) for path, leaf in shapes.items()
        }
        tree = source and source.load_part(
            part,
            _published(shapes, stored),
            config=sizes,
            dtype=traverse_util.unflatten_dict(types),
            sharding=place and traverse_util.unflatten_dict(shardings),
        )
        flat = {} if tree is None else traverse_util.flatten_dict(tree)
        missing = sorted(shapes.keys() - flat.keys())
        if missing:
            what = part if tree is None else f"LoRA of {part}"
            logging.info("%s: initialised at random", what)
            flat |= _initialise(init, key, missing, types, shardings)
        parameters[part] = traverse_util.unflatten_dict({path: flat[path] for path in shapes})
    return parameters


def check_files(config):
    """Checks the model files of a configuration for `load_parts`; reads only their headers.

    The fast check that all files are complete comes first. The check of names and shapes needs the
    shapes of the model.

    Raises:
      UserError: a file is missing or damaged, tensors are missing, unexpected or of another shape,
        or a preference objective would start from a part that is initialised at random.
    """
    source, sizes, stored = _open(config)
    if source is None:
        return
    for path in dict.fromkeys(path for part in PARTS for path in source.files(part)):
        tensor_file.read(path)
    try:
        new = [
            part
            for part in PARTS
            if source.open_part(part, _published(part_shapes(sizes, part), stored), config=sizes)
            is None
        ]
    except UserError as error:
        fields = ", ".join(
            f"config.model.{field} = {getattr(config.model, field)!r}"
            for field in _FILES
            if getattr(config.model, field)
        )
        raise UserError(f"{error} ({fields}). Give files that belong to one model.") from error
    if new and objectives.get(config.objective).needs_reference:
        _refuse_new(config, source, new[0])


def _refuse_new(config, source, part):
    """Raises the UserError of a preference objective whose reference model is partly random."""
    field = part if part in _FILES else "pretrained"
    cure = (
        "an IP-Adapter file; a new adapter has to be trained with config.objective = 'sft' first"
        if part == "adapter"
        else "files that have it"
    )
    raise UserError(
        f"config.model.{field} = {getattr(config.model, field)!r}: {source.path} has no {part}. It "
        f"would be initialised at random, but {config.objective} needs a trained reference model. "
        f"Give {cure}."
    )


def _published(shapes, stored):
    """Returns the shapes of a part that files contain: LoRA matrices only if `stored`."""
    return traverse_util.unflatten_dict(
        {
            path: leaf
            for path, leaf in shapes.items()
            if stored or path[-1] not in ("lora_a", "lora_b")
        }
    )


def files_digest(config, part):
    """Returns a SHA-256 digest of a part's sizes and files; None if it is initialised at random.

    Equal digests mean equal parameters in runs of the same `config.dtype`. The files are read in
    pieces, so that they need not fit in memory.
    """
    source, sizes, _ = _open(config)
    files = source.files(part) if source else []
    if not files:
        return None
    digest = hashlib.sha256(repr(getattr(sizes, part)).encode())
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _open(config):
    """Opens the weights of a configuration.

    Returns:
      (source of the weights or None, GeneratorConfig, rank of the stored LoRA matrices or 0).
    """
    source = _locate(config)
    sizes = source.config() if source else GeneratorConfig.from_dict(config.model.sizes)
    stored, wanted = sizes.unet.lora_rank, config.model.lora_rank
    if wanted and stored and wanted != stored:
        raise UserError(
            f"config.model.lora_rank = {wanted}: "
            f"{source.path if source else 'config.model.sizes'} has low-rank updates "
            f"of rank {stored}; give {stored}, or start from a model without updates."
        )
    if stored and config.model.lora_alpha not in (0, sizes.unet.lora_alpha):
        raise UserError(
            f"config.model.lora_alpha = {config.model.lora_alpha}: the low-rank updates of "
            f"{source.path if source else 'config.model.sizes'} have alpha "
            f"{sizes.unet.lora_alpha}; give that, or 0, which selects it."
        )
    return source, _as_configured(sizes, config), stored


def _as_configured(sizes, config):
    """Returns the generator's sizes with the fields of `config.model` that change the UNet."""
    return dataclasses.replace(
        sizes,
        unet=dataclasses.replace(
            sizes.unet,
            lora_rank=config.model.lora_rank or sizes.unet.lora_rank,
            lora_alpha=config.model.lora_alpha or sizes.unet.lora_alpha,
            remat=config.model.remat,
            scan_layers=config.model.scan_layers,
        ),
    )


def _require_latents_alone(config, sizes):
    """Raises a UserError if the UNet has more input channels than the latents."""
    if not sizes.extra_channels:
        return
    channels = sizes.vae.latent_channels
    kinds = {
        channels
        + 1: "Such a UNet is for inpainting, which focusdpo_jax.disrupt --workdir accepts. ",
        channels: "Such a UNet is for image editing (InstructPix2Pix). ",
    }
    raise UserError(
        f"{config.model.pretrained or 'config.model.sizes'}: its UNet has "
        f"{sizes.unet.in_channels} input channels (in_channels of its configuration) instead of "
        f"the {channels} of the latents. {kinds.get(sizes.extra_channels, '')}Give a model whose "
        f"UNet has {channels}."
    )


def abstract_model(config, mesh):
    """Returns the generator of a configuration, and its parameters as shapes with shardings.

    If files of `config.model.pretrained` are missing on this machine, the sizes are SDXL's, with
    the adapter that `config.model.adapter` probably names (`published.adapter_sizes`).

    Raises:
      UserError: the files are not those of SDXL, the UNet has more input channels than the latents,
        or `config.resolution` is not a multiple of the size of a latent.
    """
    try:
        source = _locate(config)
        sizes = source.config() if source else GeneratorConfig.from_dict(config.model.sizes)
    except MissingFiles as error:
        logging.warning("%s Planning for SDXL.", str(error).partition(". ")[0] + ".")
        adapter, image_encoder = published.adapter_sizes(config.model.adapter)
        sizes = GeneratorConfig(**single_file.SDXL, image_encoder=image_encoder, adapter=adapter)
    _require_latents_alone(config, sizes)
    sizes.check_resolution(config.resolution)
    sizes = _as_configured(sizes, config)
    generator = Generator(sizes, jnp.dtype(config.dtype))
    parameters = {}
    for part in PARTS:
        parameters[part] = traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(
                    leaf.shape,
                    stored_type(config, (part, *path), leaf.shape),
                    sharding=rules.parameter_sharding((part, *path), leaf.shape, mesh),
                )
                for path, leaf in part_shapes(sizes, part).items()
            }
        )
    return generator, parameters


def load_probe(config):
    """Returns the parameters of Toybox's probe in `config.model.pretrained`, or None.

    Raises:
      UserError: see `load_model`.
    """
    source = _locate(config)
    return source and _read_probe(source.path)


def _read_probe(folder):
    """Returns the parameters of the probe in a model folder; None if it has none of this version."""
    probe = model_folder.load_part(folder, "probe", dtype=jnp.float32)
    if probe is None:
        return None
    pixels = jnp.zeros((1, 64, 64, 3))
    expected = jax.eval_shape(Probe(TOYBOX).init, jax.random.key(0), pixels)["params"]
    if jax.tree.map(jnp.shape, probe) == jax.tree.map(jnp.shape, expected):
        return probe
    logging.warning(
        "%s is not used: it is a probe of another version of this package. Replace it by that of "
        "%s",
        folder / "probe.safetensors",
        shipped("toybox"),
    )
    return None


def _locate(config):
    """Returns the files that a configuration names; None if its weights are random."""
    if not config.model.pretrained:
        if config.model.prediction_type:
            raise UserError(
                f"config.model.prediction_type = {config.model.prediction_type!r}: it applies "
                "to a published model, but config.model.pretrained = ''; give '', and set "
                "config.model.sizes.prediction_type"
            )
        return None
    return pretrained.locate(
        {field: getattr(config.model, field) for field in _FILES},
        shipped,
        config.model.prediction_type,
    )


def _initialise(init, key, paths, types, shardings):
    """Returns the parameters {path: array} of `paths` from `init(key)`."""

    def initialise(key):
        # jit removes the computation of parameters that are not returned.
        flat = flatten(init(key))
        return {path: flat[path].astype(types[path]) for path in paths}

    return jax.jit(
        initialise,
        out_shardings={path: shardings[path] for path in paths},
        compiler_options=compiling.FAST_TO_COMPILE,
    )(key)


class PartsOnDemand:
    """Parts that the step does not read, such as encoders if the data is encoded once.

    They are loaded at the first call, and kept on the host between calls.
    """

    def __init__(self, config, parts, mesh):
        """Initialises it; loads nothing.

        Args:
          config: the `RunConfig`.
          parts: names of PARTS.
          mesh: device mesh on which a call places the parts.
        """
        self._config, self._parts, self._mesh = config, parts, mesh
        self._host = None

    def __call__(self):
        """Returns {part: tree} on the mesh; the arrays are not kept here."""
        if self._host is None:
            if self._parts:
                logging.info("loading %s", ", ".join(self._parts))
            self._host = jax.device_get(load_parts(self._config, self._parts))
        return jax.device_put(self._host, rules.tree_shardings(self._host, self._mesh))

    def each(self):
        """Yields (part, tree on the host); parts that were not loaded before are not kept."""
        for part in self._parts:
            loaded = self._host or jax.device_get(load_parts(self._config, [part]))
            yield part, loaded[part]


def save_model(folder, model, parameters, probe=None, others=(), step=None):
    """Writes a model folder that `load_model` can read.

    Args:
      folder: path of the folder.
      model: the `Model`, for its tokenizer, configuration and probe.
      parameters: {part: tree}.
      probe: parameters of the probe, instead of the model's.
      others: iterable of (further part, tree on the host); only one of them is held at a time.
      step: step of the run, which is recorded in the folder.
    """
    folder = epath.Path(folder)
    if processes.is_first():
        model_folder.begin(folder)
        for part, tree in others:
            model_folder.save_part(folder, part, tree)
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
    model_folder.save_config(folder, model.generator.config, step)
    logging.info("model written to %s", folder)


def describe(parameters):
    """Returns a line with the number of parameters of every part."""

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    return "parameters: " + ", ".join(
        f"{part} {count(tree) / 1e6:.2f} M" for part, tree in parameters.items()
    )
