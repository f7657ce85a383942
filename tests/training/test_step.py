"""The step's programs, compiled while other work runs."""

import functools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import state, step


def test_an_error_beside_the_compilation_does_not_wait_for_it(monkeypatch):
    finish, finished = threading.Event(), threading.Event()

    def compile_slowly(*_):
        finish.wait(60)
        finished.set()

    monkeypatch.setattr(step, "_compile", compile_slowly)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 1, jax.devices()[:1])
    with pytest.raises(OSError, match="no data"):
        with step.compile_beside(types.SimpleNamespace(mesh=mesh), None, (), (), seed=0):
            raise OSError("no data")
    assert not finished.is_set()
    finish.set()
    assert finished.wait(60)


def test_norm_and_average_are_of_optimiser_steps():
    """Two optimiser steps of four microsteps each, of the loss mean (w - x)^2 / 2."""
    accumulate, decay, rate = 4, 0.9, 0.5
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 2, jax.devices()[:1])
    placed = functools.partial(jax.device_put, device=meshes.replicated(mesh))

    def loss(trainable, frozen, batch, outputs, params, key):
        difference = trainable["unet"]["w"] - batch
        return 0.5 * jnp.mean(jnp.sum(difference**2, axis=-1)), {}

    definition = step.StepDefinition(
        reference_pass=lambda *_: ((), {}),
        loss=loss,
        buckets={"all": ("all", None)},
        frozen={},
        mesh=mesh,
    )
    optimizer = optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate)), accumulate
    )
    start = placed({"unet": {"w": jnp.zeros(3)}})
    current = state.create_state(start, optimizer, decay)
    batches = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32)
    place = functools.partial(meshes.shard_batch, mesh=mesh)
    compiled = step.compile_step(
        definition,
        optimizer,
        current,
        place(batches[0]),
        seed=0,
        accumulate=accumulate,
        ema_decay=decay,
    )
    norms = []
    for number, batch in enumerate(batches):
        current, metrics = compiled("all", current, {}, place(batch), None, number)
        norms.append(metrics.compute()["gradient_norm"])

    w, average, expected = np.zeros(3), np.zeros(3), []
    for four in batches.reshape(2, 8, 3):
        gradient = (w - four).mean(0)
        norm = np.linalg.norm(gradient)
        expected.append(norm)
        w = w - rate * gradient / max(norm, 1)
        average = decay * average + (1 - decay) * w
    np.testing.assert_allclose(current.trainable["unet"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(current.average["unet"]["w"], average, rtol=1e-5)
    np.testing.assert_allclose(np.mean(np.reshape(norms, (2, 4)), axis=1), expected, rtol=1e-5)
