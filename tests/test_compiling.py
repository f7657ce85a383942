import jax
import jax.numpy as jnp
import pytest

from focusdpo_jax import compiling
from focusdpo_jax.models.convolution import conv2d


def test_a_cpu_has_eigen_do_convolutions_and_matrix_products():
    """The option is one that this XLA knows, and does what it is for."""

    def network(x, kernel):
        y = conv2d(x, kernel)
        return y.reshape(-1, 64) @ kernel[0, 0]

    traced = jax.jit(network).trace(jnp.ones((2, 16, 16, 64)), jnp.ones((3, 3, 64, 64)))
    by_itself, ours = (
        traced.lower().compile(options).as_text() for options in ({}, compiling.networks_on("cpu"))
    )
    assert "ynn_fusion" in by_itself
    assert "ynn_fusion" not in ours


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_elsewhere_xla_has_its_way(platform):
    assert compiling.networks_on(platform) == {}


def test_what_the_environment_asks_of_xla_is_left_to_it(monkeypatch):
    ours = {}
    for flags in "", "--xla_backend_optimization_level=0":
        monkeypatch.setenv("XLA_FLAGS", flags)
        ours[flags] = compiling.networks_on("cpu")
    without, named = ours.values()
    assert set(without) - set(named) == {"xla_backend_optimization_level"}
    assert named.items() <= without.items()


def test_an_xla_that_has_dropped_the_option_compiles_without(monkeypatch):
    monkeypatch.setattr(compiling, "_ON_CPU", {"xla_cpu_no_longer_there": "1"})
    compiling._known_on_cpu.cache_clear()
    try:
        assert compiling.networks_on("cpu") == {}
    finally:
        compiling._known_on_cpu.cache_clear()
