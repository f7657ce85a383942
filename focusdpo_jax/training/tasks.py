"""From a configuration to the task that the loop trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from focusdpo_jax import config as config_rules
from focusdpo_jax.data import dataset, loader, toybox
from focusdpo_jax.evaluation.generate import make_generate
from focusdpo_jax.focus.buckets import bucket_for_step, make_buckets
from focusdpo_jax.models.generator import merge_parameters, split_parameters
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import encoding, models, objectives, pretraining
from focusdpo_jax.training.showcase import Showcase
from focusdpo_jax.training.task import Task


def make_task(config, workdir):
    """The task of `config.objective`, with its data built and its model loaded."""
    mesh = meshes.make_mesh(config.mesh.data, config.batch_size)
    sources = open_data(config)
    model = models.load_model(config, workdir)
    logging.info("%s", models.describe(model.parameters))
    make = (generator_task if config.objective in config_rules.GENERATOR_OBJECTIVES
            else encoder_task)
    return make(config, epath.Path(workdir), mesh, sources, model)


def open_data(config):
    """Builds the embedded data set unless it is there; returns {split: source}."""
    world = toybox.World(config.data.seed, config.resolution, tuple(config.data.subject_counts))
    sizes = {"train": config.data.train_size, "validation": config.data.validation_size,
             "test": config.data.test_size}
    path = dataset.build_toybox(config.data.path, world, sizes)
    return {split: dataset.open_source(path, split) for split in sizes}


def focus_buckets(config):
    """{name: (StepStructure, BucketNumbers)} of the configured objective, noisiest first."""
    focus = config.focus
    single = config.objective != "focus_dpo"
    buckets = make_buckets(
        1 if single else focus.buckets, spaf=focus.spaf and not single,
        dpce=focus.dpce and not single, detail_fraction=focus.detail_fraction,
        rho_noisy=focus.rho_noisy, rho_clean=focus.rho_clean, lambda_s=focus.lambda_s,
        lambda_d=focus.lambda_d, tau=focus.tau, gate_width=focus.gate_width,
        background=focus.background, matched=focus.matched)
    return {f"t{int(bucket.numbers.t_low):03d}-{int(bucket.numbers.t_high) - 1:03d}":
            (objectives.StepStructure(config.objective, bucket.structure), bucket.numbers)
            for bucket in buckets}


def generator_task(config, workdir, mesh, sources, model):
    """Trains the generator on pairs that the frozen encoders have seen once."""
    generator, slots = model.generator, len(config.data.subject_counts)
    transform = loader.pair_transform(tokenize=model.tokenizer, num_subjects=slots)
    trainable, frozen = split_parameters(model.parameters, config.trainable)
    trainable, frozen = meshes.replicate((trainable, frozen), mesh)
    buckets = focus_buckets(config)
    names = list(buckets)
    encode = encoding.encoder(generator, config, buckets)
    place = functools.partial(meshes.shard_batch, mesh=mesh)

    if config.data.cache:
        in_order = loader.evaluation_batches(
            sources["train"], batch_size=min(config.data.train_size, 32), transform=transform)
        source, change = encoding.cached(encode, model.parameters, in_order), _identity
        prepare = place
    else:
        source, change = sources["train"], transform

        def prepare(batch):
            return encode(model.parameters, place(batch))

    batches = loader.make_loader(
        source, batch_size=config.batch_size, seed=config.seed, transform=change)

    empty = model.tokenizer("")
    generate = make_generate(
        generator, steps=config.sampling.steps, guidance=config.sampling.guidance,
        negative_token_ids=empty)
    objective = objectives.Objective(generator, config, buckets, empty)
    fixed = {"parameters": frozen}
    if config.objective in config_rules.PREFERENCE_OBJECTIVES:
        # A copy: the loop gives the trainable parameters' own memory away.
        fixed["reference"] = jax.tree.map(jnp.copy, trainable)
    focus_maps = jax.jit(objective.focus_maps, static_argnums=0,
                         compiler_options=models.FAST_TO_COMPILE)
    showcase = Showcase(config, workdir, model, sources, encode, transform, generate, buckets,
                        lambda structure, *arguments: focus_maps(structure, fixed, *arguments))

    def merged(tree):
        return merge_parameters(tree, frozen)

    def finish(step, tree, writer):
        models.save_model(workdir / "model", model, merged(tree))
        showcase.finish(step, merged(tree), writer)

    return Task(
        trainable=trainable, frozen=fixed, buckets=buckets, batches=batches, prepare=prepare,
        guide=objective.guide, loss=objective.loss, unit="pairs",
        bucket_at=lambda number: names[bucket_for_step(config.seed, number, len(names))],
        start=lambda writer: showcase.start(model.parameters),
        sample=lambda step, tree, writer: showcase.sample(step, merged(tree), writer),
        finish=finish)


def encoder_task(config, workdir, mesh, sources, model):
    """Trains the autoencoder, the image encoder or the probe on pictures of Toybox."""
    generator, key = model.generator, jax.random.key(config.seed)
    transform = loader.pair_transform(
        tokenize=model.tokenizer, num_subjects=len(config.data.subject_counts))
    frozen = {"vae": model.parameters["vae"]}
    if config.objective == "autoencode":
        loss = pretraining.autoencoder_loss(generator)
        trainable, frozen = frozen, {}
    elif config.objective == "attributes":
        loss = pretraining.image_encoder_loss(generator)
        trainable = {"image_encoder": model.parameters["image_encoder"],
                     "heads": pretraining.init_heads(generator, key)}
    else:
        loss = pretraining.probe_loss(generator)
        trainable = {"probe": pretraining.init_probe(key)}
    trainable, frozen = meshes.replicate((trainable, frozen), mesh)

    def finish(step, tree, writer):
        parameters = model.parameters | {k: v for k, v in tree.items() if k in model.parameters}
        finished = model
        if config.objective == "autoencode":
            images = np.stack([sources["validation"][i]["chosen"]
                               for i in range(len(sources["validation"]))])
            finished = pretraining.with_latent_scale(model, parameters, images)
        models.save_model(workdir / "model", finished, parameters, tree.get("probe"))

    return Task(
        trainable=trainable, frozen=frozen, guide=_unguided, loss=loss,
        buckets={"all": (config.objective, None)},
        bucket_at=lambda number: "all", unit="scenes",
        batches=loader.make_loader(sources["train"], batch_size=config.batch_size,
                                   seed=config.seed, transform=transform),
        prepare=functools.partial(meshes.shard_batch, mesh=mesh),
        start=_nothing, sample=_nothing, finish=finish)


def _identity(entry):
    return entry


def _unguided(*_):
    """An encoder's loss needs nothing beforehand."""
    return (), {}


def _nothing(*_):
    """An encoder has no pictures to show on the way."""
