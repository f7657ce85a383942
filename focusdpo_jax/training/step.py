"""The training step as two jitted programs, compiled ahead of time.

`guide` is what a step needs and does not differentiate: the reference model's pass and the spatial
weights. It is compiled once for each distinct structure, and what a structure switches off is not in
its program. `update` is the policy's pass, its gradient and the optimiser; it takes the guidance as
data, so all structures share it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from focusdpo_jax import compiling
from focusdpo_jax.profiling import flops
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.training.measured import measured
from focusdpo_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Step:
    """The compiled programs of a run.

    Attributes:
      guides: {structure: (frozen, batch, params, key, number) -> (guidance, metrics)}.
      update: (state, frozen, batch, guidance, params, key) -> (state, Measured); `state` is donated.
      key: every random draw of a step derives from it and the number of the batch.
      matmul_flops: {structure: floating-point operations of all matrix products and convolutions of a
        whole step, over all devices}; see `operations`.
    """

    guides: Mapping[Hashable, Callable[..., Any]]
    update: Callable[..., Any]
    key: jax.Array
    matmul_flops: Mapping[Hashable, float]

    def __call__(self, structure, state, frozen, batch, params, number):
        """One batch: the new state, and what was measured (`Measured`s), still on the device."""
        guidance, of_guide = self.guides[structure](
            frozen, batch, params, self.key, np.int32(number)
        )
        state, of_update = self.update(state, frozen, batch, guidance, params, self.key)
        return state, (of_guide, of_update)


def trace_step(task, optimizer, buckets, state, batch, key, *, ema_decay=0.0):
    """A task's step before compilation; nothing is computed and no array needs to exist.

    Args:
      task: see `training.task.Task`; trainable, frozen, guide, loss and mesh are used.
      optimizer: an optax transformation.
      buckets: {name: (structure, params)}.
      state, batch, key: what the step will be given, or `jax.ShapeDtypeStruct`s with shardings.
      ema_decay: of the moving average of the parameters, if the state has one.

    Returns:
      ({structure: function that traces its guide}, function that traces the update), each to a
      `jax.stages.Traced`, which is compiled by `.lower().compile()`.
    """

    def guide(structure, frozen, batch, params, key, number):
        with trace_context(task.mesh):
            guidance, metrics = task.guide(
                structure, frozen, batch, params, jax.random.fold_in(key, number)
            )
        return guidance, measured(metrics)

    def update(state, frozen, batch, guidance, params, key):
        key = jax.random.fold_in(key, state.step)
        with trace_context(task.mesh):
            (loss, metrics), gradient = jax.value_and_grad(task.loss, has_aux=True)(
                state.trainable, frozen, batch, guidance, params, key
            )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(trainable, average, 1.0 - ema_decay)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradient), **metrics}
        return TrainState(state.step + 1, trainable, optimizer_state, average), measured(metrics)

    examples, whole = meshes.batch_sharding(task.mesh), meshes.replicated(task.mesh)
    guide = jax.jit(guide, static_argnums=0, out_shardings=(examples, whole))
    number = np.int32(0)
    structures = dict(buckets.values())
    first, params = next(iter(structures.items()))
    guidance, _ = jax.eval_shape(
        lambda *arguments: guide(first, *arguments), task.frozen, batch, params, key, number
    )
    guidance = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=examples), guidance
    )

    def trace_update():
        # The state stays where it lies.
        lies = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(update, donate_argnums=0, out_shardings=(lies, whole)).trace(
            state, task.frozen, batch, guidance, params, key
        )

    def trace_guide(structure):
        return guide.trace(structure, task.frozen, batch, structures[structure], key, number)

    return {s: functools.partial(trace_guide, s) for s in structures}, trace_update


def compile_step(task, optimizer, buckets, state, batch, *, seed, ema_decay=0.0):
    """Compiles a task's step; see `compile_beside`, which this is while nothing else happens."""
    with compile_beside(
        task, optimizer, buckets, state, batch, seed=seed, ema_decay=ema_decay
    ) as step:
        return step.result()


@contextlib.contextmanager
def compile_beside(task, optimizer, buckets, state, batch, *, seed, ema_decay=0.0):
    """Compiles a task's step, its programs side by side, while the body does something else.

    Args:
      task, optimizer, buckets, ema_decay: see `trace_step`.
      state, batch: examples of what the step will be given. Shapes and shardings are taken at once,
        so that the arrays may go.
      seed: every random draw of a step derives from (seed, number of the batch).

    Yields:
      The future of a Step.
    """
    # Here, where all processes are in step: it runs on all devices.
    key = meshes.random_key(seed, task.mesh)
    state, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
    )
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        yield pool.submit(_compile, task, optimizer, buckets, state, batch, key, ema_decay)
    finally:
        pool.shutdown(wait=False)  # An error of the body is told now, not minutes later.


def _compile(task, optimizer, buckets, state, batch, key, ema_decay):
    start = time.monotonic()
    guides, update = trace_step(task, optimizer, buckets, state, batch, key, ema_decay=ema_decay)

    options = compiling.networks_on(task.mesh.devices.flat[0].platform)

    def compiled(trace):
        traced = trace()
        return traced.lower().compile(options), flops.count(traced)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        # The policy's backward pass takes longest, so it goes first.
        update = pool.submit(compiled, update)
        guides = dict(zip(guides, pool.map(compiled, guides.values()), strict=True))
        update, work = update.result()
    step = Step(
        {structure: guide for structure, (guide, _) in guides.items()},
        update,
        key,
        {structure: work.matmul_flops + its.matmul_flops for structure, (_, its) in guides.items()},
    )
    logging.info(
        "compiled %s for %s in %.1f s, and the policy's update that they share",
        _count(len(guides), "executable"),
        _count(len(buckets), "bucket"),
        time.monotonic() - start,
    )
    for structure in guides:
        logging.info(
            "  %s: %s",
            structure,
            ", ".join(name for name, (other, _) in buckets.items() if other == structure),
        )
    return step


def _count(number, noun):
    return f"{number} {noun}" + "s" * (number != 1)
