"""The updates of the optimisers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from focusdpo_jax.training import state

SHAPES = {
    "dense": {"kernel": (24, 16), "bias": (16,)},
    "conv": {"kernel": (3, 3, 8, 16)},
    "pixels": {"kernel": (3, 3, 8, 3)},
    "embedding": {"embedding": (32, 16)},
    "transformer_blocks": {"kernel": (2, 24, 16), "scale": (2, 16)},
}


def updates(config):
    """The first update of parameters of SHAPES that are zero, and their gradient."""
    keys = iter(jax.random.split(jax.random.key(0), 20))
    gradient = jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    parameters = jax.tree.map(jnp.zeros_like, gradient)
    optimizer = state.make_optimizer(config)
    made, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
    return made, gradient


@pytest.fixture
def config(tiny_config):
    return lambda **fields: tiny_config(
        learning_rate=0.01, warmup_steps=0, gradient_clip=1e9, weight_decay=0.0, **fields
    )


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw(config):
    made, gradient = updates(config(optimizer="muon"))
    matrices = [
        made["dense"]["kernel"],
        made["conv"]["kernel"].reshape(-1, 16),
        *made["transformer_blocks"]["kernel"],
    ]
    for update in matrices:
        values = np.linalg.svd(update, compute_uv=False)
        # Five Newton-Schulz steps bring singular values to about 0.7 to 1.2 of each other.
        assert values.min() > 0.5 * values.max()
        # As long as Adam's, whose entries have a root mean square of about 0.2 in training.
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(update**2)), 0.2 * 0.01, rtol=0.15)
    values = np.linalg.svd(gradient["dense"]["kernel"], compute_uv=False)
    assert values.min() < 0.3 * values.max()
    for part, name in (
        ("dense", "bias"),
        ("pixels", "kernel"),
        ("embedding", "embedding"),
        ("transformer_blocks", "scale"),
    ):
        leaf = gradient[part][name]
        adamw = optax.adamw(0.01, b2=0.99, weight_decay=0.0, nesterov=True)
        expected, _ = adamw.update(leaf, adamw.init(leaf), leaf)
        np.testing.assert_allclose(made[part][name], expected, rtol=1e-5)


def test_adamw_is_optax_own(config):
    made, gradient = updates(config(optimizer="adamw"))
    reference = optax.adamw(0.01, b2=0.99, weight_decay=0.0)
    parameters = jax.tree.map(jnp.zeros_like, gradient)
    expected, _ = reference.update(gradient, reference.init(parameters), parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), made, expected)


def test_muon_needs_less_memory_than_adamw(config):
    def size(name):
        optimizer = state.make_optimizer(config(optimizer=name))
        parameters = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
        return sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(parameters)))

    matrices = 24 * 16 + 3 * 3 * 8 * 16 + 2 * 24 * 16
    assert size("adamw") - size("muon") == pytest.approx(matrices, abs=16)  # And counters.


def test_wsd_is_constant_until_the_last_fifth():
    """Steps added before the decay begins leave the rates so far as they were."""

    def rates(steps, at):
        config = types.SimpleNamespace(learning_rate=0.5, warmup_steps=10, decay="wsd", steps=steps)
        schedule = state.learning_rate_schedule(config)
        return [float(schedule(step)) for step in at]

    assert rates(100, [0, 5, 10, 80]) == [0, 0.25, 0.5, 0.5]
    np.testing.assert_allclose(rates(100, [85, 90, 100, 101]), [0.375, 0.25, 0, 0], atol=1e-7)
    assert rates(100, range(80)) == rates(1000, range(80))
    assert rates(4, [0, 4]) == [0, pytest.approx(0.2)]  # Shorter than its warm-up.
