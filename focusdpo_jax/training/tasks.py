"""From a configuration to the task that the loop trains."""

import functools
import hashlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util

from focusdpo_jax import compiling
from focusdpo_jax import config as config_rules
from focusdpo_jax.data import dataset, loader
from focusdpo_jax.errors import UserError
from focusdpo_jax.focus.buckets import bucket_for_step, make_buckets
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.models import stacking, truncation
from focusdpo_jax.models.generator import PARTS, merge_parameters, split_parameters
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes, rules
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.toybox import pretraining
from focusdpo_jax.training import encoding, encoding_cache, models, objectives
from focusdpo_jax.training.showcase import Showcase
from focusdpo_jax.training.sources import EncoderSource, make_source
from focusdpo_jax.training.task import Task


def make_task(config, workdir):
    """The task of `config.objective`, with its data built and its model loaded."""
    mesh = meshes.make_mesh(config.mesh, config.batch_size)
    sources = open_data(config)
    make = generator_task if config.objective in config_rules.GENERATOR_OBJECTIVES else encoder_task
    return make(config, epath.Path(workdir), mesh, sources)


def open_data(config):
    """The data set of `config.data.source`; Toybox is built unless it is there.

    Returns:
      {split: source}: "train", "validation" and, for Toybox or where `prepare` kept one, "test".

    Raises:
      UserError: there is no prepared data set, or it does not fit the configuration.
    """
    if config.data.source == "prepared":
        return _open_prepared(config)
    sizes = {
        "train": config.data.train_size,
        "validation": config.data.validation_size,
        "test": config.data.test_size,
    }
    # Process 0 first: on a shared disk the others find what it has built.
    if not processes.is_first():
        processes.wait("data")
    path = dataset.build_toybox(config.data.path, dataset.toybox_world(config), sizes)
    if processes.is_first():
        processes.wait("data")
    return {split: dataset.open_source(path, split) for split in sizes}


def _open_prepared(config):
    sources = dataset.open_prepared(config.data.path)
    side, count = sources["train"].settings["resolution"], len(sources["train"])
    if side != config.resolution:
        raise UserError(
            f"config.resolution = {config.resolution}: the pictures of "
            f"{config.data.path} have {side}; give that, or prepare them again"
        )
    config_rules.require_pairs(
        config,
        config.data.path,
        count,
        meshes.batch_shares(meshes.make_mesh(config.mesh, config.batch_size)),
    )
    if "validation" not in sources:
        logging.info(
            "%s keeps no pairs for validation; pictures show training pairs", config.data.path
        )
    return {"validation": sources["train"]} | sources


def subject_slots(config, sources):
    """Subject slots of a batch: the most subjects that a record of the data set may have."""
    if config.data.source == "prepared":
        return sources["train"].settings["subjects"]
    return len(config.data.subject_counts)


def focus_buckets(config):
    """{name: (StepStructure, BucketParams)} of the configured objective, noisiest first."""
    focus = config.focus
    single = config.objective != "focus_dpo"
    buckets = make_buckets(
        1 if single else focus.buckets,
        spaf=focus.spaf and not single,
        dpce=focus.dpce and not single,
        detail_fraction=focus.detail_fraction,
        rho_noisy=focus.rho_noisy,
        rho_clean=focus.rho_clean,
        lambda_s=focus.lambda_s,
        lambda_d=focus.lambda_d,
        lambda_c=0.0 if single else focus.lambda_c,
        tau=focus.tau,
        gate_width=focus.gate_width,
        background=focus.background,
        matched=focus.matched,
    )
    return {
        f"t{int(bucket.params.t_low):03d}-{int(bucket.params.t_high) - 1:03d}": (
            objectives.StepStructure(config.objective, bucket.structure),
            bucket.params,
        )
        for bucket in buckets
    }


def generator_task(config, workdir, mesh, sources):
    """Trains the generator on pairs that the frozen encoders have seen once."""
    model = models.open_model(config)
    generator = model.generator
    _warn_of_long_captions(config, model, sources)
    transform = loader.pair_transform(
        tokenize=model.tokenizer,
        num_subjects=subject_slots(config, sources),
        reference_size=generator.config.image_encoder.image_size,
    )
    empty = model.tokenizer("")
    buckets = focus_buckets(config)
    names = list(buckets)
    source, encode_placed = make_encoder(generator, config, buckets)
    encode_kept = kept_encoder(config, generator, source, encode_placed)
    objective = objectives.Objective(generator, config, empty, source)

    # Where everything is encoded once, steps leave encoders alone; otherwise they ask them.
    held = objective.parts if config.data.cache else PARTS
    parameters = models.load_parts(
        config, held, functools.partial(rules.parameter_sharding, mesh=mesh)
    )
    logging.info("%s", models.describe(parameters))
    others = models.PartsOnDemand(config, [part for part in PARTS if part not in held], mesh)
    trainable, frozen = split_parameters(parameters, config.trainable)
    del parameters  # The loop gives the memory of the trainable ones away.
    fixed = {"parameters": {part: tree for part, tree in frozen.items() if part in objective.parts}}
    if config.objective in config_rules.PREFERENCE_OBJECTIVES:
        fixed["reference"] = as_computed(trainable, config.dtype)

    def merged(tree):
        """All parameters of a generator with these trainable ones."""
        return merge_parameters(tree, frozen | others())

    def at_start():
        """What encoding reads: the generator as it was before the first step."""
        return merged(fixed.get("reference", {}))

    if objective.drops:
        with trace_context(mesh):
            fixed["unconditional"] = jax.jit(
                objective.unconditional, out_shardings=meshes.replicated(mesh)
            )(at_start())

    stored = functools.cache(functools.partial(_stored, config, sources["train"], model, source))

    def example():
        if config.data.cache and stored():
            return _batch_of(_stacked(stored()[0], 1), config.batch_size, mesh)
        with trace_context(mesh):
            encoded = jax.eval_shape(
                encode_kept if config.data.cache else encode_placed,
                at_start(),
                _stacked(
                    transform(sources["train"][0]), rows_at_once(config, sources["train"], mesh)
                ),
            )
        return _batch_of(encoded, config.batch_size, mesh)

    if config.data.cache:
        prepare = functools.partial(meshes.shard_batch, mesh=mesh)
    else:
        parameters = at_start()

        def prepare(batch):
            with trace_context(mesh):
                return encode_placed(parameters, meshes.shard_batch(batch, mesh))

    def open_batches():
        pairs, change = sources["train"], transform
        if config.data.cache:
            pairs, change = (
                stored()
                or _cached(config, pairs, model, at_start, encode_kept, source, transform, mesh),
                None,
            )
            if config.data.source == "toybox":
                pairs = encoding.in_memory(pairs)
        return _loader(config, mesh, pairs, change)

    draw = make_generate(
        generator,
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        negative_token_ids=empty,
    )

    def generate(*arguments):
        with trace_context(mesh):
            return draw(*arguments)

    look = jax.jit(
        objective.focus_maps, static_argnums=0, compiler_options=compiling.FAST_TO_COMPILE
    )

    def focus_maps(structure, *arguments):
        with trace_context(mesh):
            return look(structure, fixed, *arguments)

    showcase = Showcase(
        config,
        workdir,
        model,
        sources,
        mesh,
        _by_rows(encode_placed, mesh),
        transform,
        generate,
        buckets,
        focus_maps,
        merged,
        at_start,
        fixed.get("reference"),
    )

    def finish(step, tree, writer):
        models.save_model(
            workdir / "model",
            model,
            merge_parameters(tree, frozen),
            others=others.each(),
            step=step,
        )
        showcase.finish(step, tree, writer)

    return Task(
        trainable=trainable,
        frozen=fixed,
        buckets=buckets,
        example=example,
        open_batches=open_batches,
        prepare=prepare,
        guide=objective.guide,
        loss=objective.loss,
        unit="pairs",
        bucket_at=lambda number: names[bucket_for_step(config.seed, number, len(names))],
        start=lambda writer: showcase.start(trainable),
        sample=showcase.sample,
        finish=finish,
        mesh=mesh,
    )


def _warn_of_long_captions(config, model, sources):
    """One warning about people's captions that the model does not read to their ends.

    Toybox's own captions fit: its tokenizer was made for them.
    """
    if config.data.source == "prepared" and processes.is_first():
        by_path = {id(source): source for source in sources.values()}  # Splits may be one.
        found = [source.texts() for source in by_path.values()]
        seen, count = sum(map(len, found)), sum(map(len, by_path.values()))
        among = "" if seen == count else f", the first {seen} of {count} pairs"
        truncation.warn(
            model.tokenizer,
            itertools.chain(*found),
            f"config.data.path = {config.data.path!r}{among}",
        )


def as_computed(parameters, dtype):
    """A copy of parameters in the types that the model computes with, which is all it needs.

    Layers use matrices in `dtype`, and the vectors of norms in float32.
    """
    return traverse_util.unflatten_dict(
        {
            path: jnp.array(x, x.dtype if stacking.is_vector(path, x.shape) else dtype)
            for path, x in traverse_util.flatten_dict(parameters).items()
        }
    )


def make_encoder(generator, config, buckets):
    """What encodes pairs for all of a run's buckets.

    Returns:
      SPAF's source (see `sources`), None where no bucket has SPAF; and the function of
      `encoding.encoder`.
    """
    source, weights = None, [structure.weight for structure, _ in buckets.values()]
    if any(weight.spaf for weight in weights):
        source = make_source(generator, config, [params for _, params in buckets.values()])
    return source, encoding.encoder(
        generator,
        config,
        source,
        dpce=any(weight.dpce for weight in weights),
        quality=config.objective == "patch_dpo",
    )


def _by_rows(encode, mesh):
    """`encode` of batches that lie on the host, in any size."""

    def encode_rows(parameters, batch):
        with trace_context(mesh):
            return encode(parameters, meshes.shard_rows(batch, mesh))

    return encode_rows


def _cached(config, records, model, parameters, encode, source, transform, mesh):
    """What the encoders say of every pair, beside the data set where it can be kept."""
    batches = loader.evaluation_batches(
        records, transform=transform, batch_size=rows_at_once(config, records, mesh)
    )
    place = _place(config, records, model, _kept_source(config, model.generator, source)[0])
    if place is None:
        return encoding.cached(_by_rows(encode, mesh), parameters(), batches, len(records))
    return encoding_cache.cached(*place, parameters, _by_rows(encode, mesh), batches, len(records))


def _stored(config, records, model, source):
    """What `_cached` will find without asking an encoder, or None."""
    place = _place(config, records, model, _kept_source(config, model.generator, source)[0])
    return place and encoding_cache.complete(*place, len(records))


def _kept_source(config, generator, source):
    """The source of the similarity that is kept, and whether more is kept than a run looks at.

    Of a prepared set everything is kept that any objective of pairs looks at, so that rivals share
    the files.
    """
    if config.data.source == "toybox" or config.objective in config_rules.SUPERVISED_OBJECTIVES:
        return source, False
    return source or EncoderSource(generator, config.focus.prototypes), True


def kept_encoder(config, generator, source, encode):
    """`encode`, or what encodes all that is kept where that is more."""
    source, widened = _kept_source(config, generator, source)
    if not widened:
        return encode
    return encoding.encoder(generator, config, source, dpce=True, quality=True)


def _place(config, records, model, source):
    """Where encoded records lie and what they depend on: the first arguments of `cached`.

    Toybox's lie under a name of their own for each of that, and are never refused. None where they
    stay in memory: where Toybox's encoders are in no file.
    """
    sizes = model.generator.config
    parts = {part: getattr(sizes, part) for part in encoding_cache.parts_read(config, source)}
    files = functools.cache(functools.partial(models.files_digest, config))
    path = epath.Path(config.data.path)
    if config.data.source == "prepared":
        key = encoding_cache.make_key(model, config, records.settings["content"], source)
        return path / encoding_cache.folder_name(config, source), key, parts, files
    told = {part: files(part) for part in parts}
    if None in told.values():
        return None
    key = encoding_cache.make_key(model, config, records.settings, source) | {
        "objective": config.objective,
        "spaf": config.focus.spaf,
        "dpce": config.focus.dpce,
        "chosen alone": encoding.learns_from_chosen_alone(config),
    }
    name = hashlib.sha256(json.dumps([key, told], sort_keys=True).encode()).hexdigest()[:10]
    return path / "encoded" / f"toybox-{name}", key, parts, files


def rows_at_once(config, records, mesh):
    """Pairs that are encoded together; each device has as many as the others."""
    shares = meshes.batch_shares(mesh)
    size = min(len(records), config.evaluation.batch_size)
    return -(-size // shares) * shares


def _loader(config, mesh, records, transform):
    """The batches of this process."""
    part, parts = meshes.batch_share(mesh, config.batch_size)
    order = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "process_index": part,
        "process_count": parts,
    }
    if isinstance(records, encoding.EncodedSource):
        # In memory, so that nobody waits: the rows of a batch are taken at once, without a thread.
        return loader.make_loader(
            range(len(records)), batch_transform=records.__getitem__, threads=0, **order
        )
    return loader.make_loader(records, transform=transform, workers=config.data.workers, **order)


def _stacked(row, count):
    """Shapes of `count` examples like this one."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (count, *np.shape(x)), jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
        ),
        row,
    )


def _batch_of(tree, count, mesh):
    """The same shapes in a batch of `count`, as `meshes.shard_batch` places it."""
    examples = meshes.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=examples), tree
    )


def encoder_task(config, workdir, mesh, sources):
    """Trains the autoencoder, the image encoder or the probe on pictures of Toybox."""
    model = models.load_model(config, functools.partial(rules.parameter_sharding, mesh=mesh))
    logging.info("%s", models.describe(model.parameters))
    generator, key = model.generator, jax.random.key(config.seed)
    transform = loader.pair_transform(
        tokenize=model.tokenizer, num_subjects=subject_slots(config, sources)
    )
    frozen = {"vae": model.parameters["vae"]}
    if config.objective == "autoencode":
        loss = pretraining.autoencoder_loss(generator)
        trainable, frozen = frozen, {}
    elif config.objective == "attributes":
        loss = pretraining.image_encoder_loss(generator)
        trainable = {
            "image_encoder": model.parameters["image_encoder"],
            "heads": pretraining.init_heads(generator, key),
        }
    else:
        loss = pretraining.probe_loss(generator)
        trainable = {"probe": pretraining.init_probe(key)}
    # What was loaded lies on the mesh; heads and probe are new.
    trainable = jax.device_put(trainable, rules.tree_shardings(trainable, mesh))

    def finish(step, tree, writer):
        parameters = model.parameters | {k: v for k, v in tree.items() if k in model.parameters}
        finished = model
        if config.objective == "autoencode":
            images = np.stack(
                [sources["validation"][i]["chosen"] for i in range(len(sources["validation"]))]
            )
            finished = pretraining.with_latent_scale(model, parameters, images)
        models.save_model(workdir / "model", finished, parameters, tree.get("probe"), step=step)

    return Task(
        trainable=trainable,
        frozen=frozen,
        guide=_unguided,
        loss=loss,
        buckets={"all": (config.objective, None)},
        bucket_at=lambda number: "all",
        unit="scenes",
        example=lambda: _batch_of(
            _stacked(transform(sources["train"][0]), 1), config.batch_size, mesh
        ),
        open_batches=lambda: _loader(config, mesh, sources["train"], transform),
        prepare=functools.partial(meshes.shard_batch, mesh=mesh),
        start=_nothing,
        sample=_nothing,
        finish=finish,
        mesh=mesh,
    )


def _unguided(*_):
    """An encoder's loss needs nothing beforehand."""
    return (), {}


def _nothing(*_):
    """An encoder has no pictures to show on the way."""
