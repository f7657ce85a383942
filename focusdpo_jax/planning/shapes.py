"""A run's step from shapes alone: no parameter, no picture and no device has to be there."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax import config as config_rules
from focusdpo_jax.data.record import PreferenceBatch
from focusdpo_jax.models.generator import merge_parameters, split_parameters
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import rules
from focusdpo_jax.training import models, objectives, tasks
from focusdpo_jax.training.state import create_state, make_optimizer


def abstract_step(config, mesh):
    """What `training.step.trace_step` takes, as shapes with shardings.

    Args:
      config: of a generator's objective; `complete` or not.
      mesh: of devices that may not be there.

    Returns:
      A namespace: task, optimizer, state, batch, key; encoders, the parameters that the step does not
      read and a run holds nevertheless, to encode its batches; and for the run's other programs: others,
      the parameters that the step does not read, whether held or not, generator, objective, source,
      empty (the empty prompt) and encode.
    """
    config = config_rules.complete(config)
    generator, parameters = models.abstract_model(config, mesh)
    trainable, frozen = split_parameters(parameters, config.trainable)
    buckets = tasks.focus_buckets(config)
    source, encode = tasks.make_encoder(generator, config, buckets)
    length = generator.config.text_encoder.max_length
    empty = np.zeros((2, length), np.int32)
    objective = objectives.Objective(generator, config, empty, source)
    fixed = {"parameters": {part: tree for part, tree in frozen.items() if part in objective.parts}}
    if config.objective in config_rules.PREFERENCE_OBJECTIVES:
        kept = jax.eval_shape(lambda tree: tasks.as_computed(tree, config.dtype), trainable)
        fixed["reference"] = placed(kept, rules.tree_shardings(kept, mesh))
    if objective.drops:
        fixed["unconditional"] = placed(
            jax.eval_shape(objective.unconditional, merge_parameters(trainable, frozen)),
            meshes.replicated(mesh),
        )
    encoded = jax.eval_shape(
        encode, merge_parameters(trainable, frozen), raw_batch(config, generator)
    )
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda tree: create_state(tree, optimizer, config.ema_decay), trainable)
    whole = meshes.replicated(mesh)
    others = {part: tree for part, tree in frozen.items() if part not in objective.parts}
    return types.SimpleNamespace(
        encoders={} if config.data.cache else others,
        others=others,
        generator=generator,
        objective=objective,
        source=source,
        empty=empty,
        encode=encode,
        task=types.SimpleNamespace(
            trainable=trainable,
            frozen=fixed,
            guide=objective.guide,
            loss=objective.loss,
            buckets=buckets,
            mesh=mesh,
        ),
        optimizer=optimizer,
        state=placed(state, state_shardings(state, mesh)),
        batch=placed(encoded, jax.tree.map(lambda _: meshes.batch_sharding(mesh), encoded)),
        key=placed(jax.eval_shape(lambda: jax.random.key(0)), whole),
    )


def state_shardings(state, mesh):
    """The shardings of a TrainState: moments and averages lie as their parameters do."""
    parts = set(state.trainable)

    def sharding(path, leaf):
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        starts = [i for i, name in enumerate(names) if name in parts]
        if not starts or not leaf.shape:
            return meshes.replicated(mesh)
        return rules.parameter_sharding(tuple(names[starts[0] :]), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def raw_batch(config, generator, count=None):
    """A PreferenceBatch of shapes, of as many subject slots as the data may need.

    Args:
      count: pairs; `config.batch_size` if None.
    """
    count, slots = count or config.batch_size, len(config.data.subject_counts)
    side, size = config.resolution, generator.config.image_encoder.image_size
    length = generator.config.text_encoder.max_length

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((count, *shape), dtype)

    return PreferenceBatch(
        chosen=array(jnp.uint8, side, side, 3),
        rejected=array(jnp.uint8, side, side, 3),
        references=array(jnp.uint8, slots, size, size, 3),
        reference_masks=array(bool, slots, size, size),
        masks=array(bool, slots, side, side),
        present=array(bool, slots),
        prior_mask=array(bool, side, side),
        time_ids=array(jnp.float32, 6),
        token_ids=array(jnp.int32, 2, length),
        index=array(jnp.int32),
        truth={},
    )


def placed(tree, shardings):
    """A tree of shapes with these shardings, a tree or one for all."""
    shardings = (
        jax.tree.map(lambda _: shardings, tree)
        if isinstance(shardings, jax.sharding.Sharding)
        else shardings
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
