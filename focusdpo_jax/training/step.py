"""The jitted training step, compiled once for each distinct structure."""

import concurrent.futures
import time

import jax
import optax
from absl import logging
from clu import metrics as clu_metrics

from focusdpo_jax.training.state import TrainState


def make_step(loss_function, optimizer, *, seed, ema_decay=0.0):
    """Builds the function that `compile_steps` compiles.

    Args:
      loss_function: (structure, trainable, frozen, batch, numbers, key) -> (loss, metrics), with
        `structure` static and metrics a dict of scalars.
      optimizer: an optax transformation.
      seed: every random draw of a step derives from (seed, step).
      ema_decay: of the moving average of the parameters, if the state has one.

    Returns:
      step(structure, state, frozen, batch, numbers) -> (state, metrics), jitted; `state` is
      donated. The metrics are a clu collection of averages, left on the device.
    """

    def step(structure, state, frozen, batch, numbers):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), gradient = jax.value_and_grad(
            lambda trainable: loss_function(structure, trainable, frozen, batch, numbers, key),
            has_aux=True)(state.trainable)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(trainable, average, 1.0 - ema_decay)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradient), **metrics}
        return TrainState(state.step + 1, trainable, optimizer_state, average), averages(metrics)

    return jax.jit(step, static_argnums=0, donate_argnums=1)


def averages(metrics):
    """A clu collection that averages every scalar of `metrics` over the steps it is merged with."""
    fields = {name: clu_metrics.Average.from_output(name) for name in metrics}
    return clu_metrics.Collection.create(**fields).single_from_model_output(**metrics)


def compile_steps(step, structures, state, frozen, batch, numbers):
    """Compiles `step` ahead of time for every distinct structure, side by side.

    Args:
      structures: {structure: name of the buckets that share it}.
      numbers: {structure: an example of its dynamic numbers}.

    Returns:
      {structure: compiled step(state, frozen, batch, numbers)}.
    """

    def compile_one(structure):
        start = time.monotonic()
        compiled = step.lower(structure, state, frozen, batch, numbers[structure]).compile()
        return compiled, time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = dict(zip(structures, pool.map(compile_one, structures)))
    logging.info("compiled %d training executable%s for %d bucket%s", len(results),
                 "s"[:len(results) != 1], sum(map(len, structures.values())),
                 "s"[:sum(map(len, structures.values())) != 1])
    for structure, names in structures.items():
        logging.info("  %s: %s (%.1f s)", structure, ", ".join(names), results[structure][1])
    return {structure: compiled for structure, (compiled, _) in results.items()}
