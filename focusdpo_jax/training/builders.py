"""Builds the task of a run: its model, data, step and sample images."""

import functools

import jax
import numpy as np
from absl import logging
from etils import epath

from focusdpo_jax import compiling, objectives
from focusdpo_jax.data import loader
from focusdpo_jax.focus.buckets import bucket_for_step
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.models.generator import PARTS
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import rules
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.training import models, run_data
from focusdpo_jax.training.assembly import assemble
from focusdpo_jax.training.generator_step import GeneratorStep
from focusdpo_jax.training.pair_batches import PairBatches
from focusdpo_jax.training.showcase import Showcase
from focusdpo_jax.training.step import StepDefinition
from focusdpo_jax.training.task import Task


def make_task(config, workdir):
    """Builds the data, loads the model, and returns the `Task` of `config.objective`."""
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    sources = run_data.open_data(config)
    trains_generator = objectives.get(config.objective).trains_generator
    make = generator_task if trains_generator else encoder_task
    return make(config, epath.Path(workdir), mesh, sources)


def generator_task(config, workdir, mesh, sources):
    """Returns the `Task` of a generator's objective.

    Args:
      config: the `RunConfig`.
      workdir: folder of the run, an `epath.Path`.
      mesh: device mesh.
      sources: {split: records}, from `run_data.open_data`.
    """
    # The model. If the data is encoded once, steps need no encoders, and these stay on disk.
    model = models.open_model(config)
    generator, empty = model.generator, model.tokenizer("")
    run_data.warn_of_long_captions(config, model, sources)
    parts = GeneratorStep(generator, config, empty).parts if config.data.cache else PARTS
    parameters = models.load_parts(
        config, parts, functools.partial(rules.parameter_sharding, mesh=mesh)
    )
    logging.info("%s", models.describe(parameters))
    others = models.PartsOnDemand(config, [part for part in PARTS if part not in parts], mesh)

    # The step.
    assembly = assemble(config, generator, parameters, empty, mesh, others)
    del parameters  # The loop donates the memory of the trainable parameters.
    definition, trainable = assembly.definition, assembly.trainable
    names = list(definition.buckets)

    # The data.
    transform = loader.pair_transform(
        tokenize=model.tokenizer,
        num_subjects=run_data.subject_slots(config, sources),
        reference_size=generator.config.image_encoder.image_size,
    )
    batches = PairBatches(
        config=config,
        model=model,
        assembly=assembly,
        records=sources["train"],
        transform=transform,
        initial_parameters=lambda: assembly.initial_parameters(others()),
    )

    # Sample images and the final evaluation.
    showcase = Showcase(
        config,
        workdir,
        model,
        sources,
        batches,
        mesh=mesh,
        generate=_generate(config, generator, empty, mesh),
        buckets=definition.buckets,
        focus_maps=_focus_maps(assembly),
        merged=lambda tree: assembly.all_parameters(tree, others()),
        reference=definition.frozen.get("reference"),
    )

    def finish(step, tree, writer):
        models.save_model(
            workdir / "model",
            model,
            assembly.all_parameters(tree),
            others=others.each(),
            step=step,
        )
        showcase.finish(step, tree, writer)

    return Task(
        trainable=trainable,
        definition=definition,
        example=batches.example,
        open_batches=batches.open,
        prepare=batches.prepare,
        unit="pairs",
        bucket_at=lambda step: names[bucket_for_step(config.seed, step, len(names))],
        start=lambda writer: showcase.start(trainable),
        sample=showcase.sample,
        finish=finish,
    )


def _generate(config, generator, empty, mesh):
    """Returns the run's sampler, which runs on its mesh."""
    sample = make_generate(
        generator,
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        negative_token_ids=empty,
    )

    def generate(*arguments):
        with trace_context(mesh):
            return sample(*arguments)

    return generate


def _focus_maps(assembly):
    """Returns the function (structure, trainable, encoded, params, key) -> FocusMaps."""
    definition = assembly.definition
    # It runs only a few times, so compilation takes longer than execution.
    compute = jax.jit(
        assembly.step.focus_maps, static_argnums=0, compiler_options=compiling.FAST_TO_COMPILE
    )

    def focus_maps(structure, trainable, *arguments):
        with trace_context(definition.mesh):
            return compute(structure, definition.pass_inputs(trainable), *arguments)

    return focus_maps


def encoder_task(config, workdir, mesh, sources):
    """Returns the `Task` that trains Toybox's autoencoder, image encoder or probe.

    See `generator_task` for the arguments.
    """
    model = models.load_model(config, functools.partial(rules.parameter_sharding, mesh=mesh))
    logging.info("%s", models.describe(model.parameters))
    objective = objectives.get(config.objective)
    assert isinstance(objective, objectives.EncoderObjective), objective.name
    transform = loader.pair_transform(
        tokenize=model.tokenizer, num_subjects=run_data.subject_slots(config, sources)
    )
    trainable, frozen = objective.parameters(model, jax.random.key(config.seed))
    # Loaded parameters are on the mesh already; new ones are not.
    trainable = jax.device_put(trainable, rules.tree_shardings(trainable, mesh))

    def validation_images():
        records = sources["validation"]
        return np.stack([records[i]["chosen"] for i in range(len(records))])

    def finish(step, tree, writer):
        del writer
        trained = {part: value for part, value in tree.items() if part in model.parameters}
        finished = objective.finish(model, trained, validation_images)
        models.save_model(
            workdir / "model", finished, model.parameters | trained, tree.get("probe"), step=step
        )

    return Task(
        trainable=trainable,
        definition=StepDefinition(
            reference_pass=_no_reference_pass,
            loss=objective.make_loss(model),
            buckets={"all": (config.objective, None)},
            frozen=frozen,
            mesh=mesh,
        ),
        bucket_at=lambda step: "all",
        unit="scenes",
        example=lambda: run_data.batch_shapes(
            run_data.stacked_shapes(transform(sources["train"][0]), 1), config.batch_size, mesh
        ),
        open_batches=lambda: run_data.open_loader(config, mesh, sources["train"], transform),
        prepare=functools.partial(meshes.shard_batch, mesh=mesh),
        start=_nothing,
        sample=_nothing,
        finish=finish,
    )


def _no_reference_pass(*_):
    """The loss of an encoder has no reference pass."""
    return (), {}


def _nothing(*_):
    """Training an encoder writes no sample images."""
