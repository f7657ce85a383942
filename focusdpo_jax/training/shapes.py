"""Builds a run's step from shapes, without parameters, images or devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from focusdpo_jax.config import RunConfig
from focusdpo_jax.data.record import PreferenceBatch
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import rules
from focusdpo_jax.training import models
from focusdpo_jax.training.assembly import Assembly, assemble
from focusdpo_jax.training.state import TrainState, create_state, make_optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """The arguments of `training.step.trace_step` and a run's other arrays, as sharded shapes.

    Attributes:
      assembly: the `Assembly` of the step.
      optimizer, state, batch, key: see `trace_step`.
      empty: int [2, L], a placeholder for the tokens of the empty caption.
      others: parameters that the step does not read.
      encoders: those of `others` that a run keeps in memory to encode its batches.
    """

    assembly: Assembly
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: Any
    key: Any
    empty: np.ndarray
    others: dict
    encoders: dict


def abstract_step(config: RunConfig, mesh: Mesh) -> AbstractStep:
    """Returns the AbstractStep of a run.

    Args:
      config: a `RunConfig` with a generator's objective.
      mesh: device mesh; its devices may be absent.
    """
    generator, parameters = models.abstract_model(config, mesh)
    empty = np.zeros((2, generator.config.text_encoder.max_length), np.int32)
    assembly = assemble(config, generator, parameters, empty, mesh)
    encoded = jax.eval_shape(
        assembly.encode,
        assembly.all_parameters(assembly.trainable),
        raw_batch(config, generator),
    )
    optimizer = make_optimizer(config)
    state = jax.eval_shape(
        lambda tree: create_state(tree, optimizer, config.ema_decay), assembly.trainable
    )
    whole = meshes.replicated(mesh)
    others = {
        part: tree for part, tree in assembly.untrained.items() if part not in assembly.step.parts
    }
    return AbstractStep(
        assembly=assembly,
        optimizer=optimizer,
        state=meshes.placed_shapes(state, state_shardings(state, mesh)),
        batch=meshes.placed_shapes(encoded, meshes.batch_sharding(mesh)),
        key=meshes.placed_shapes(jax.eval_shape(lambda: jax.random.key(0)), whole),
        empty=empty,
        others=others,
        encoders={} if config.data.cache else others,
    )


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a TrainState; moments and averages follow their parameters."""
    parts = set(state.trainable)

    def sharding(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        names = [getattr(key, "key", getattr(key, "name", "")) for key in path]
        starts = [i for i, name in enumerate(names) if name in parts]
        if not starts or not leaf.shape:
            return meshes.replicated(mesh)
        return rules.parameter_sharding(tuple(names[starts[0] :]), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def raw_batch(config: RunConfig, generator: Any, count: int | None = None) -> PreferenceBatch:
    """Returns a PreferenceBatch of shapes with the largest number of subject slots.

    Args:
      config: the `RunConfig`.
      generator: a Generator, for the sizes of references and token ids.
      count: number of pairs; `config.batch_size` if None.
    """
    count, slots = count or config.batch_size, len(config.data.subject_counts)
    side, size = config.resolution, generator.config.image_encoder.image_size
    length = generator.config.text_encoder.max_length

    def array(dtype: Any, *shape: int) -> Any:
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
