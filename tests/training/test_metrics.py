"""A step's scalars in one array, and their means."""

import jax
import jax.numpy as jnp
import pytest
from clu import metrics

from focusdpo_jax.training.metrics import StepMetrics, join, mean_by_bucket, merge


def of(**scalars):
    return StepMetrics.from_model_output(**{k: jnp.float32(v) for k, v in scalars.items()})


def test_scalars_keep_their_names_through_programs_and_a_sum():
    first = jax.jit(lambda x: StepMetrics.from_model_output(loss=x, accuracy=x > 0))
    second = jax.jit(lambda x: StepMetrics.from_model_output(**{"a/gate": 2 * x}))
    one, two = (join(first(x), second(x)) for x in (jnp.float32(3.0), jnp.float32(-1.0)))
    both = merge(one, two)
    assert isinstance(both, metrics.Metric)
    assert both.sums() == (2, {"loss": 2.0, "accuracy": 1.0, "a/gate": 4.0})
    assert both.compute() == {"loss": 1.0, "accuracy": 0.5, "a/gate": 2.0}
    # One array, however many scalars, and the count.
    assert [leaf.shape for leaf in jax.tree.leaves(both)] == [(3,), ()]


def test_the_count_adds_no_operation_to_a_program():
    program = jax.make_jaxpr(lambda x, y: StepMetrics.from_model_output(loss=x, gate=y))(0.0, 1.0)
    packing = jax.make_jaxpr(lambda x, y: jnp.stack([jnp.float32(x), jnp.float32(y)]))(0.0, 1.0)
    assert len(program.eqns) == len(packing.eqns)


def test_a_program_may_compute_nothing():
    assert merge(join(of(), of(loss=1.5)), join(of(), of(loss=2.5))).compute() == {"loss": 2.0}


def test_other_names_are_not_merged():
    with pytest.raises(ValueError, match=r"\('loss',\) cannot be merged with \('gate',\)"):
        merge(of(loss=1.0), of(gate=1.0))


def test_reduce_sums_along_the_first_axis():
    """As CLU reduces the metrics of several devices."""
    parts = [of(loss=1.0, gate=0.0), of(loss=2.0, gate=1.0), of(loss=6.0, gate=1.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *parts)
    assert stacked.reduce().sums() == (3, {"loss": 9.0, "gate": 2.0})


def test_means_are_of_float32_sums_in_the_order_of_the_steps():
    """Another order or type gives other last digits: 2^24 swallows ones that come after it."""
    total = merge(merge(of(loss=2.0**24), of(loss=1.0)), of(loss=1.0))
    assert mean_by_bucket({"all": total}, several=False) == {"loss": 2.0**24 / 3}
    total = merge(merge(of(loss=1.0), of(loss=1.0)), of(loss=2.0**24))
    assert mean_by_bucket({"all": total}, several=False) == {"loss": (2.0**24 + 2) / 3}
    assert mean_by_bucket({"noisy": of(loss=2.0)}) == {"loss": 2.0, "noisy/loss": 2.0}


def test_buckets_are_averaged_by_their_steps_and_each_for_itself():
    clean = merge(of(loss=1.0, gate=0.5), of(loss=2.0, gate=1.0))
    assert mean_by_bucket({"noisy": of(loss=6.0), "clean": clean}) == {
        "gate": 0.75,
        "loss": 3.0,
        "clean/loss": 1.5,
        "clean/gate": 0.75,
        "noisy/loss": 6.0,
    }
    assert list(mean_by_bucket({"noisy": of(loss=6.0), "clean": clean})) == [
        "gate",
        "loss",
        "clean/loss",
        "clean/gate",
        "noisy/loss",
    ]
