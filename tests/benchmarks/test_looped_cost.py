"""Bodies of loops count as often as they run."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="module")
def looped_cost(import_benchmark):
    return import_benchmark("looped_cost")


def test_a_loop_in_a_loop_counts_as_often_as_it_runs(looped_cost):
    def inner(x, matrix):
        return jax.lax.scan(lambda x, _: (x @ matrix, None), x, length=3)

    def program(x, matrices):
        return jax.lax.scan(inner, x, matrices)[0]

    x, matrices = jnp.ones((64, 64)), jnp.ones((5, 64, 64))
    compiled = jax.jit(program).lower(x, matrices).compile()
    operations, accessed = looped_cost.count(compiled)
    products = 2 * 64**3
    assert compiled.cost_analysis()["flops"] == pytest.approx(products, rel=0.01)
    assert operations == pytest.approx(3 * 5 * products, rel=0.01)
    # Each product reads two matrices and writes one.
    assert accessed >= 3 * 5 * 3 * x.nbytes


def test_straight_programs_count_as_xla_does(looped_cost):
    x = jnp.ones((32, 48))
    compiled = jax.jit(lambda x: jnp.tanh(x @ x.T)).lower(x).compile()
    cost = compiled.cost_analysis()
    assert looped_cost.count(compiled) == (cost["flops"], cost["bytes accessed"])
