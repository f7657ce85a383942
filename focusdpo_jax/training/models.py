"""The model of a run: read before training, written after it."""

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
from focusdpo_jax.training.part_shapes import part_shapes

# Fields of config.model that name files.
_FILES = ("pretrained", "adapter", "image_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator with its parameters, and the other contents of its folder.

    Attributes:
      generator: the functions.
      parameters: {part: tree} of every part that was read, in the types of `stored_type`.
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
    bfloat16, but for the autoencoder's encoder, which computes in float32, and for vectors: norms use
    theirs in float32, and they take no room.

    Args:
      config: the run's; `dtype` and `trainable` matter.
      path: of the parameter, from its part on.
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
    """The `GeneratorConfig` of a configuration, from the configuration files of its model.

    Args:
      inpainting: whether the UNet may read more than latents, as one for inpainting does.

    Raises:
      UserError: files are missing or damaged, parts do not fit together, or the UNet reads more than
        latents.
    """
    sizes = _open(config)[1]
    if not inpainting:
        _require_latents_alone(config, sizes)
    return sizes


def load_model(config, place=None, *, inpainting=False):
    """Reads `config.model.pretrained`, or makes a model of `config.model.sizes` at random.

    `open_model` and `load_parts` in one.
    """
    model = open_model(config, inpainting=inpainting)
    return model.with_parameters(load_parts(config, PARTS, place))


def open_model(config, *, inpainting=False):
    """The model of a configuration without its generator's parameters, which are not read.

    Args:
      inpainting: whether the UNet may read more than latents, as one for inpainting does.

    Raises:
      UserError: the folder or one of its files is missing, damaged or of other sizes, the vocabulary is
        not that of the text encoders, or the UNet reads more than it is given.
    """
    source, sizes, _ = _open(config)
    if not inpainting:
        _require_latents_alone(config, sizes)
    generator = Generator(sizes, jnp.dtype(config.dtype))
    length = sizes.text_encoder.max_length
    if source is None:
        return Model(generator, {}, Tokenizer.of_words(toybox.vocabulary(), length), None)
    tokenizer = Tokenizer(source.tokenizer, length, source.pad_tokens)
    # The end of a text is the last word of a vocabulary.
    words = int(tokenizer("").max()) + 1
    known = min(sizes.text_encoder.vocab_size, sizes.text_encoder_2.vocab_size)
    if words > known:
        raise UserError(
            f"{source.tokenizer} has a vocabulary of {words}, and the text encoders read "
            f"{known}: set config.model.tokenizer to the one that they were trained with"
        )
    return Model(generator, {}, tokenizer, model_folder.load_part(source.path, "probe"))


def load_parts(config, parts, place=None):
    """Parameters of some parts of the model of a configuration.

    What is read is a model folder, as runs leave it, or SDXL in the layouts of `pretrained`.
    Parts that the files lack are drawn from `config.seed`, and so are the low-rank updates of
    LoRA that `config.model.lora_rank` asks for where there are none. Updates that lie in the folder
    are read, whether the configuration speaks of them or not.

    Args:
      parts: names of PARTS.
      place: (path of a parameter from its part on, shape) -> sharding; None keeps on the host what
        is read.

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
            logging.info("%s: %s at random", part, "made" if tree is None else "LoRA made")
            flat |= _draw(init, key, missing, types, shardings)
        parameters[part] = traverse_util.unflatten_dict({path: flat[path] for path in shapes})
    return parameters


def check_files(config):
    """Checks from headers alone that the files of a configuration are what `load_parts` expects.

    Whether all files are complete is checked first, which takes no time; names and shapes then need
    the shapes of the model.

    Raises:
      UserError: a file is missing or damaged, tensors are missing, unexpected or of another shape, or
        a preference objective would start from a part that is drawn at random.
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
        given = ", ".join(
            f"config.model.{field} = {getattr(config.model, field)!r}"
            for field in _FILES
            if getattr(config.model, field)
        )
        raise UserError(f"{error} ({given}). Give files that belong to one model.") from error
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
        f"config.model.{field} = {getattr(config.model, field)!r}: {source.path} has no {part}. It would be drawn "
        f"at random, and {config.objective} compares with a reference model that has it. Give {cure}."
    )


def _published(shapes, stored):
    """Of the shapes of a part the tree that files have: low-rank updates only where `stored`."""
    return traverse_util.unflatten_dict(
        {
            path: leaf
            for path, leaf in shapes.items()
            if stored or path[-1] not in ("lora_a", "lora_b")
        }
    )


def files_digest(config, part):
    """Of a part's sizes and the files that it is read from; None where it is drawn at random.

    What has the same digest has the same parameters in runs of the same `config.dtype`. The files
    are read in pieces, and nothing of them is kept.
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
    """What a complete configuration names.

    Returns:
      Where the weights lie, or None; the generator's sizes; rank of the updates that lie there.
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
            f"{sizes.unet.lora_alpha}; give that, or 0, which takes it."
        )
    return source, _as_configured(sizes, config), stored


def _as_configured(sizes, config):
    """The generator's sizes with the fields of `config.model` that change the UNet."""
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
    """Raises a UserError where a UNet reads more than latents, as those for inpainting do."""
    if not sizes.extra_channels:
        return
    channels = sizes.vae.latent_channels
    kinds = {
        channels
        + 1: "One of those is for inpainting, which focusdpo_jax.disrupt --workdir takes. ",
        channels: "One of those edits pictures (InstructPix2Pix). ",
    }
    raise UserError(
        f"{config.model.pretrained or 'config.model.sizes'}: its UNet reads "
        f"{sizes.unet.in_channels} channels (in_channels of its configuration), and not the "
        f"{channels} of the latents alone. {kinds.get(sizes.extra_channels, '')}"
        f"Give a model whose UNet reads {channels}."
    )


def abstract_model(config, mesh):
    """The generator of a configuration, and its parameters as shapes with shardings.

    Where `config.model.pretrained` is not on this machine, or not all of it, the sizes are SDXL's, with the
    adapter that `config.model.adapter` seems to name (`published.adapter_sizes`).

    Raises:
      UserError: the files that are here are no SDXL, the UNet reads more than latents, or there are no
        latents for `config.resolution`.
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
    """Parameters of Toybox's probe beside `config.model.pretrained`, or None where there is none.

    Raises:
      UserError: as `load_model`.
    """
    source = _locate(config)
    return source and model_folder.load_part(source.path, "probe")


def _locate(config):
    """The files that a complete configuration names; None where its weights are random."""
    if not config.model.pretrained:
        if config.model.prediction_type:
            raise UserError(
                f"config.model.prediction_type = {config.model.prediction_type!r}: it is "
                "about a published model, and config.model.pretrained = ''; give '', and "
                "config.model.sizes.prediction_type"
            )
        return None
    return pretrained.locate(
        {field: getattr(config.model, field) for field in _FILES},
        shipped,
        config.model.prediction_type,
    )


def _draw(init, key, paths, types, shardings):
    """The parameters {path: array} of `paths` that `init` draws."""

    def draw(key):
        # Of what is not returned nothing is computed.
        flat = flatten(init(key))
        return {path: flat[path].astype(types[path]) for path in paths}

    return jax.jit(
        draw,
        out_shardings={path: shardings[path] for path in paths},
        compiler_options=compiling.FAST_TO_COMPILE,
    )(key)


class PartsOnDemand:
    """Parts that a step does not read: encoders, once everything is encoded.

    They are read when they are needed for the first time, perhaps never, and lie on the host
    between one time and the next.
    """

    def __init__(self, config, parts, mesh):
        """Takes the run's configuration, names of PARTS, and where they are to lie when needed."""
        self._config, self._parts, self._mesh = config, parts, mesh
        self._host = None

    def __call__(self):
        """{part: tree} on the mesh, as long as the caller keeps it."""
        if self._host is None:
            if self._parts:
                logging.info("reading %s", ", ".join(self._parts))
            self._host = jax.device_get(load_parts(self._config, self._parts))
        return jax.device_put(self._host, rules.tree_shardings(self._host, self._mesh))

    def each(self):
        """Yields (part, tree on the host); what was not needed before is read and not kept."""
        for part in self._parts:
            held = self._host or jax.device_get(load_parts(self._config, [part]))
            yield part, held[part]


def save_model(folder, model, parameters, probe=None, others=(), step=None):
    """Writes a model folder that `load_model` reads back.

    Args:
      model: what is not a parameter of the generator.
      parameters: {part: tree}.
      probe: parameters in the place of the model's.
      others: pairs of a further part and its tree on the host, of which one is looked at at a time.
      step: of the run, which the folder records.
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
    """One line a part: how many parameters it has."""

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    return "parameters: " + ", ".join(
        f"{part} {count(tree) / 1e6:.2f} M" for part, tree in parameters.items()
    )
