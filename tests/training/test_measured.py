"""A step's numbers in one array."""

import jax
import jax.numpy as jnp

from focusdpo_jax.training.measured import added, as_floats, measured


def test_numbers_keep_their_names_through_a_program_and_a_sum():
    first = jax.jit(lambda x: measured({"loss": x, "accuracy": x > 0}))
    second = jax.jit(lambda x: measured({"gate": 2 * x}))
    one, two = ((first(x), second(x)) for x in (jnp.float32(3.0), jnp.float32(-1.0)))
    assert as_floats(added(one, two)) == {"loss": 2.0, "accuracy": 1.0, "gate": 4.0}
    # One array a program, however many numbers.
    assert [leaf.shape for leaf in jax.tree.leaves(one)] == [(2,), (1,)]


def test_a_program_may_measure_nothing():
    nothing = measured({}), measured({"loss": jnp.float32(1.5)})
    assert as_floats(added(nothing, nothing)) == {"loss": 3.0}
