"""The training step as two jitted programs, compiled ahead of time.

The *reference pass* computes the inputs of the loss that need no gradient: the errors of the
reference model and the spatial weights. It is compiled once for each distinct structure, and its
program omits the terms that the structure excludes. The *update* computes the policy's loss and
gradient, and applies the optimiser. It takes the outputs of the reference pass as data, so that all
structures share it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from focusdpo_jax import compiling
from focusdpo_jax.profiling import flops
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.training.metrics import StepMetrics, join
from focusdpo_jax.training.state import (
    TrainState,
    accumulated_gradient,
    ends_optimizer_step,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDefinition:
    """The functions of a step and their constant arguments; arrays may be shapes.

    Attributes:
      reference_pass: (structure, frozen, batch, params, key) -> (outputs, dict of scalars).
        Computes the inputs of the loss that need no gradient. `structure` is static and selects the
        program.
      loss: (trainable, frozen, batch, outputs, params, key) -> (loss, dict of scalars).
      buckets: {name: (structure, params)}; buckets of equal structure share one executable.
      frozen: dict of arrays that both functions read besides the trainable parameters.
      reads_policy: whether the reference pass reads the current trainable parameters, too, as
        `frozen["policy"]`.
      mesh: device mesh of parameters and batches.
    """

    reference_pass: Callable
    loss: Callable
    buckets: Mapping[str, tuple[Hashable, Any]]
    frozen: Mapping[str, Any]
    mesh: jax.sharding.Mesh
    reads_policy: bool = False

    def pass_inputs(self, trainable: Any) -> Mapping[str, Any]:
        """Returns the first argument of the reference passes: arrays, or shapes."""
        return _pass_inputs(self.frozen, trainable, self.reads_policy)


def _pass_inputs(frozen, trainable, reads_policy):
    return {**frozen, "policy": trainable} if reads_policy else frozen


@dataclasses.dataclass(frozen=True)
class Step:
    """The compiled programs of a run.

    Attributes:
      reference_passes: {structure: (frozen, batch, params, key, microstep) -> ((key, outputs),
        StepMetrics)}.
      update: (state, frozen, batch, outputs, params, key) -> (state, StepMetrics); `state` is
        donated.
      key: PRNG key of the run; the key of a step is derived from it and the microstep.
      reads_policy: see `StepDefinition`.
      matmul_flops: {structure: floating-point operations of all matrix products and convolutions of
        a whole step, summed over devices}; see `profiling.flops`.
    """

    reference_passes: Mapping[Hashable, Callable[..., Any]]
    update: Callable[..., Any]
    key: jax.Array
    matmul_flops: Mapping[Hashable, float]
    reads_policy: bool = False

    def __call__(self, structure, state, frozen, batch, params, microstep):
        """Runs one batch; returns the new state and its StepMetrics, both on the device."""
        inputs = _pass_inputs(frozen, state.trainable, self.reads_policy)
        (key, outputs), reference_metrics = self.reference_passes[structure](
            inputs, batch, params, self.key, np.int32(microstep)
        )
        state, update_metrics = self.update(state, frozen, batch, outputs, params, key)
        return state, join(reference_metrics, update_metrics)


def trace_step(definition, optimizer, state, batch, key, *, accumulate=1, ema_decay=0.0):
    """Returns functions that trace a step from shapes; nothing is computed.

    Args:
      definition: a StepDefinition.
      optimizer: an optax transformation, from `state.make_optimizer`.
      state, batch, key: the arguments of the step, or `jax.ShapeDtypeStruct`s with shardings.
      accumulate: microsteps whose gradients are averaged into one optimiser step.
      ema_decay: decay per optimiser step of the moving average of the parameters, if the state has
        one.

    Returns:
      ({structure: function that traces its reference pass}, function that traces the update). Each
      returns a `jax.stages.Traced`, which `.lower().compile()` compiles.
    """
    mesh, frozen = definition.mesh, definition.frozen

    def reference_pass(structure, frozen, batch, params, key, microstep):
        # The folded key is returned, so that the update draws the same noise.
        key = jax.random.fold_in(key, microstep)
        with trace_context(mesh):
            outputs, metrics = definition.reference_pass(structure, frozen, batch, params, key)
        return (key, outputs), StepMetrics.from_model_output(**metrics)

    def update(state, frozen, batch, outputs, params, key):
        with trace_context(mesh):
            (loss, metrics), gradient = jax.value_and_grad(definition.loss, has_aux=True)(
                state.trainable, frozen, batch, outputs, params, key
            )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        # The logged norm and the moving average refer to optimiser steps, not to microsteps.
        whole_gradient = gradient
        if accumulate > 1:
            ends = ends_optimizer_step(state.optimizer, accumulate)
            whole_gradient = accumulated_gradient(state.optimizer, gradient)
        average = state.average
        if average is not None:
            moved = optax.incremental_update(trainable, average, 1.0 - ema_decay)
            if accumulate > 1:
                moved = jax.tree.map(lambda new, old: jnp.where(ends, new, old), moved, average)
            average = moved
        norm = optax.global_norm(whole_gradient)
        if accumulate > 1:  # So that the mean over microsteps equals that over optimiser steps.
            norm = jnp.where(ends, accumulate * norm, 0.0)
        metrics = {"loss": loss, "gradient_norm": norm, **metrics}
        state = TrainState(state.step + 1, trainable, optimizer_state, average)
        return state, StepMetrics.from_model_output(**metrics)

    examples, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    reference_pass = jax.jit(
        reference_pass, static_argnums=0, out_shardings=((whole, examples), whole)
    )
    microstep = np.int32(0)
    structures = dict(definition.buckets.values())
    first, params = next(iter(structures.items()))
    inputs = definition.pass_inputs(state.trainable)
    (folded, outputs), _ = jax.eval_shape(
        lambda *arguments: reference_pass(first, *arguments), inputs, batch, params, key, microstep
    )
    folded, outputs = (
        jax.tree.map(
            lambda x, sharding=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
        )
        for tree, sharding in ((folded, whole), (outputs, examples))
    )

    def trace_update():
        # The new state has the shardings of the old one.
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(update, donate_argnums=0, out_shardings=(shardings, whole)).trace(
            state, frozen, batch, outputs, params, folded
        )

    def trace_reference_pass(structure):
        return reference_pass.trace(structure, inputs, batch, structures[structure], key, microstep)

    return {s: functools.partial(trace_reference_pass, s) for s in structures}, trace_update


def compile_step(definition, optimizer, state, batch, *, seed, accumulate=1, ema_decay=0.0):
    """Compiles a step and returns the `Step`; see `compile_beside` for the arguments."""
    with compile_beside(
        definition,
        optimizer,
        state,
        batch,
        seed=seed,
        accumulate=accumulate,
        ema_decay=ema_decay,
    ) as step:
        return step.result()


@contextlib.contextmanager
def compile_beside(definition, optimizer, state, batch, *, seed, accumulate=1, ema_decay=0.0):
    """Compiles a step's programs in threads while the body of the `with` statement runs.

    Args:
      definition, optimizer, accumulate, ema_decay: see `trace_step`.
      state, batch: examples of the step's arguments. Only their shapes and shardings are kept, so
        that the arrays may be freed.
      seed: seed of the run; the PRNG key of a step is derived from (seed, microstep).

    Yields:
      The future of a Step.
    """
    # Not in the thread: this runs on all devices, which needs the same order on all processes.
    key = meshes.random_key(seed, definition.mesh)
    state, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
    )
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        yield pool.submit(_compile, definition, optimizer, state, batch, key, accumulate, ema_decay)
    finally:
        pool.shutdown(wait=False)  # An error of the body is raised at once, not minutes later.


def _compile(definition, optimizer, state, batch, key, accumulate, ema_decay):
    start = time.monotonic()
    passes, update = trace_step(
        definition, optimizer, state, batch, key, accumulate=accumulate, ema_decay=ema_decay
    )
    options = compiling.network_options(definition.mesh.devices.flat[0].platform)

    def compiled(trace):
        traced = trace()
        return traced.lower().compile(options), flops.count(traced)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        # The update contains the backward pass and takes longest, so it is submitted first.
        update = pool.submit(compiled, update)
        passes = dict(zip(passes, pool.map(compiled, passes.values()), strict=True))
        update, update_flops = update.result()
    step = Step(
        {structure: program for structure, (program, _) in passes.items()},
        update,
        key,
        {
            structure: update_flops.matmul_flops + pass_flops.matmul_flops
            for structure, (_, pass_flops) in passes.items()
        },
        definition.reads_policy,
    )
    logging.info(
        "compiled %s for %s in %.1f s, and the update that they share",
        _count(len(passes), "executable"),
        _count(len(definition.buckets), "bucket"),
        time.monotonic() - start,
    )
    for structure in passes:
        names = (name for name, (other, _) in definition.buckets.items() if other == structure)
        logging.info("  %s: %s", structure, ", ".join(names))
    return step


def _count(number, noun):
    return f"{number} {noun}" + "s" * (number != 1)
