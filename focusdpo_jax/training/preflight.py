"""Checks of a run that need only its configuration and the headers of its files, in seconds.

They come before anything is written, built or compiled, the cheapest first.
"""

import time

from absl import logging

from focusdpo_jax import objectives
from focusdpo_jax.data import dataset
from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import memory, models, run_data


def check(config):
    """Checks model, data set, devices, weights, memory and vocabulary of a run.

    Args:
      config: a RunConfig that `config.check` has passed.

    Raises:
      UserError: the run would fail; it names the field or file, its value and the cure.
    """
    start = time.monotonic()
    try:
        room = _check(config)
    except UserError:
        logging.info("checked for %.1f s; nothing was built", time.monotonic() - start)
        raise
    logging.info(
        "checked configuration, weights and memory in %.1f s%s", time.monotonic() - start, room
    )


def outline(config):
    """What a run is about to do, in one sentence.

    Args:
      config: a RunConfig that `config.check` has passed.
    """
    accumulated = f" times {config.accumulate}" if config.accumulate > 1 else ""
    parts = [
        f"{config.objective} on {config.data.source}, {config.steps} steps of "
        f"{config.batch_size}{accumulated}"
    ]
    if objectives.get(config.objective).trains_generator:
        evaluation = config.evaluation
        if evaluation.pictures:
            every = (
                f"every {config.sample_every} steps and "
                if 0 < config.sample_every < config.steps
                else ""
            )
            parts.append(f"{evaluation.pictures} validation scenes to look at {every}at the end")
        if evaluation.scenes and config.data.source == "toybox":
            parts.append(
                f"then {evaluation.scenes} test scenes drawn by base and policy and measured"
            )
    return "; ".join(parts) + ". Time left is logged on the way"


def _check(config):
    """Runs the checks of `check`; returns the part of its log line about memory."""
    sizes = models.generator_config(config)
    sizes.check_resolution(config.resolution)
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    if config.data.source == "prepared":
        run_data.open_data(config)
    else:
        dataset.toybox_world(config)
    models.check_files(config)
    room = ""
    # Those that train an encoder are small, Toybox's alone.
    if objectives.get(config.objective).trains_generator:
        held, available = memory.require_fit(config, mesh)
        room = f": {held / 1e9:.2f} GB are held on each device before activations" + (
            f", of {available / 1e9:.1f}" if available is not None else ""
        )
    # Its vocabulary; the library that reads it takes a second to import.
    models.open_model(config)
    return room
