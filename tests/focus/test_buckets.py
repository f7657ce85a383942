"""Buckets: their ranges and schedules, the order of visits, and timesteps."""

import jax
import numpy as np
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.focus import buckets as bk


def test_four_buckets_with_two_structures():
    buckets = bk.make_buckets(4, rho_noisy=0.2, rho_clean=1.0, detail_fraction=0.5)
    ranges = [(int(b.params.t_low), int(b.params.t_high)) for b in buckets]
    assert ranges == [(750, 1000), (500, 750), (250, 500), (0, 250)]
    np.testing.assert_allclose([b.params.rho for b in buckets], [0.3, 0.5, 0.7, 0.9], rtol=1e-6)
    assert [b.structure.dpce for b in buckets] == [False, False, True, True]
    assert [str(s) for s in bk.structures(buckets)] == ["spaf", "spaf+dpce"]


@pytest.mark.parametrize("count", [1, 3, 7, 1000])
def test_buckets_tile_the_timesteps(count):
    covered = np.concatenate(
        [np.arange(b.params.t_low, b.params.t_high) for b in bk.make_buckets(count)[::-1]]
    )
    np.testing.assert_array_equal(covered, np.arange(1000))


@pytest.mark.parametrize("fraction, enabled", [(0.0, 0), (0.25, 1), (1.0, 4)])
def test_detail_fraction_counts_from_the_clean_end(fraction, enabled):
    dpce = [b.structure.dpce for b in bk.make_buckets(4, detail_fraction=fraction)]
    assert dpce == [False] * (4 - enabled) + [True] * enabled


@pytest.mark.parametrize("count, fraction, enabled", [(5, 0.7, 4), (10, 0.85, 9), (20, 0.575, 12)])
def test_a_fraction_loses_no_bucket_to_rounding(count, fraction, enabled):
    buckets = bk.make_buckets(count, detail_fraction=fraction)
    assert sum(bucket.structure.dpce for bucket in buckets) == enabled


def test_terms_can_be_switched_off_everywhere():
    assert bk.structures(bk.make_buckets(4, spaf=False, dpce=False)) == (
        bk.BucketStructure(spaf=False, dpce=False),
    )
    assert [str(s) for s in bk.structures(bk.make_buckets(4, spaf=False))] == ["prior", "dpce"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", 0),
        ("count", 1001),
        ("tau", 1.5),
        ("matched", -0.1),
        ("detail_fraction", 2),
        ("background", -1),
        ("lambda_s", float("nan")),
        ("rho_clean", float("inf")),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}; choose"):
        bk.make_buckets(**{field: value})


def test_every_block_of_steps_visits_every_bucket_once():
    visits = np.array([bk.bucket_for_step(3, step, 5) for step in range(500)]).reshape(100, 5)
    np.testing.assert_array_equal(np.sort(visits, axis=1), np.tile(np.arange(5), (100, 1)))
    # Orders vary from block to block and favour no bucket: 20 of 100 expected in each place.
    assert len({tuple(block) for block in visits}) > 40
    first = np.bincount(visits[:, 0], minlength=5)
    assert first.min() > 8 and first.max() < 34


def test_the_order_is_a_function_of_seed_and_step():
    order = lambda seed: [bk.bucket_for_step(seed, step, 4) for step in range(40)]
    assert order(0) == order(0)
    assert order(0) != order(1)
    # Pinned: a resumed run must find the order its first half used.
    assert order(0)[:8] == [1, 2, 3, 0, 0, 1, 2, 3]


def test_buckets_of_one_structure_share_an_executable():
    traces = []

    @jax.jit
    def step(params):
        traces.append(params)
        return params.rho * 2

    for bucket in (*bk.make_buckets(4), *bk.make_buckets(2, lambda_s=2, background=0)):
        step(bucket.params)
    assert len(traces) == 1
    assert {x.dtype for x in bucket.params} == {np.dtype("int32"), np.dtype("float32")}


def test_timesteps_are_uniform_within_the_bucket():
    params = bk.make_buckets(4)[2].params  # [250, 500)
    t = np.asarray(bk.sample_timesteps(jax.random.key(0), params, 20_000))
    assert t.min() == 250 and t.max() == 499 and t.dtype == np.int32
    assert abs(t.mean() - 374.5) < 2  # standard error 0.5
