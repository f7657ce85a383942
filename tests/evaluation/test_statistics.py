"""Bootstrap intervals against binomial and normal theory, and by hand."""

import numpy as np
import pytest

from focusdpo_jax.evaluation import statistics

NAN = np.nan


def test_the_mean_is_a_ratio_of_sums_over_defined_values():
    # Four values in two scenes; the third scene has none. Not the mean of the scenes' means.
    estimate = statistics.bootstrap_mean([[1, 1, 1], [0, NAN, NAN], [NAN, NAN, NAN]], seed=0)
    assert estimate.mean == 0.75 and estimate.n == 2
    # Resamples: both scenes, or twice the first (1), or twice the second (0).
    assert (estimate.low, estimate.high) == (0, 1)


def test_the_interval_of_a_share_is_the_binomial_one():
    values = np.arange(400) < 120
    estimate = statistics.bootstrap_mean(values, seed=1)
    deviation = np.sqrt(0.3 * 0.7 / 400)
    assert estimate.mean == pytest.approx(0.3) and estimate.n == 400
    assert estimate.low == pytest.approx(0.3 - 1.96 * deviation, abs=0.005)
    assert estimate.high == pytest.approx(0.3 + 1.96 * deviation, abs=0.005)
    narrow = statistics.bootstrap_mean(values, seed=1, confidence=0.6827)
    assert narrow.high - narrow.low == pytest.approx(2 * deviation, abs=0.006)


def test_scenes_are_resampled_whole():
    # Subjects of a scene agree: 100 scenes of three say no more than 100 scenes of one.
    one = (np.arange(100) < 50)[:, None].astype(float)
    estimates = [statistics.bootstrap_mean(v, seed=2) for v in (one, np.tile(one, 3))]
    assert estimates[0] == estimates[1]
    assert estimates[0].high - estimates[0].low > 0.15  # 300 values alone: 0.113.


def test_intervals_depend_on_the_seed_alone():
    values = np.random.default_rng(0).random(50)
    first, again, other = (statistics.bootstrap_mean(values, seed=s) for s in (5, 5, 6))
    assert first == again
    assert first.mean == other.mean and first.low != other.low


def test_a_difference_is_of_the_same_scenes():
    draw = np.random.default_rng(0)
    hard = draw.normal(size=(200, 1))  # What a scene does to both.
    first = hard + 0.1 * draw.normal(size=(200, 2))
    second = hard + 0.5 + 0.1 * draw.normal(size=(200, 2))
    estimate = statistics.bootstrap_difference(first, second, seed=0)
    assert estimate.n == 200 and estimate.mean == pytest.approx(second.mean() - first.mean())
    deviation = (second.mean(1) - first.mean(1)).std() / np.sqrt(200)
    assert estimate.low == pytest.approx(estimate.mean - 1.96 * deviation, abs=0.004)
    assert estimate.high == pytest.approx(estimate.mean + 1.96 * deviation, abs=0.004)
    # Each by itself is ten times less certain.
    alone = statistics.bootstrap_mean(first, seed=0)
    assert alone.high - alone.low > 8 * (estimate.high - estimate.low)


def test_a_difference_leaves_out_scenes_that_one_side_does_not_define():
    estimate = statistics.bootstrap_difference(
        [[1, 3], [NAN, NAN], [5, 5]], [[2, NAN], [7, 7], [NAN, NAN]], seed=0
    )
    assert estimate == (0.0, 0.0, 0.0, 1)
    assert statistics.bootstrap_difference([NAN], [1.0], seed=0).n == 0
