import jax
import jax.numpy as jnp
import pytest

from focusdpo_jax import compiling
from focusdpo_jax.models.convolution import conv2d


def test_cpus_use_eigen_for_convolutions_and_matrix_products():
    """This XLA has the option, and it has its effect."""

    def network(x, kernel):
        y = conv2d(x, kernel)
        return y.reshape(-1, 64) @ kernel[0, 0]

    traced = jax.jit(network).trace(jnp.ones((2, 16, 16, 64)), jnp.ones((3, 3, 64, 64)))
    by_itself, ours = (
        traced.lower().compile(options).as_text()
        for options in ({}, compiling.network_options("cpu"))
    )
    assert "ynn_fusion" in by_itself
    assert "ynn_fusion" not in ours


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_other_platforms_have_no_options(platform):
    assert compiling.network_options(platform) == {}


def test_options_in_xla_flags_are_left_out(monkeypatch):
    ours = {}
    for flags in "", "--xla_backend_optimization_level=0":
        monkeypatch.setenv("XLA_FLAGS", flags)
        ours[flags] = compiling.network_options("cpu")
    without, named = ours.values()
    assert set(without) - set(named) == {"xla_backend_optimization_level"}
    assert named.items() <= without.items()


def test_options_that_xla_does_not_have_are_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "_ON_CPU", {"xla_cpu_no_longer_there": "1"})
    compiling._known_on_cpu.cache_clear()
    try:
        assert compiling.network_options("cpu") == {}
    finally:
        compiling._known_on_cpu.cache_clear()
