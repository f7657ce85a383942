import numpy as np
import pytest

from focusdpo_jax.toybox import nuisances


@pytest.mark.parametrize("trace", nuisances.KINDS)
def test_a_trace_stays_inside_its_mask(trace):
    rng = np.random.default_rng(0)
    canvas = rng.uniform(60, 200, (3, 64, 64)).astype(np.float32)
    before, mask = canvas.copy(), np.zeros((64, 64), bool)
    mask[20:40, 10:50] = True
    after = trace(rng, canvas, mask)
    np.testing.assert_array_equal(canvas, before)
    np.testing.assert_array_equal(after[:, ~mask], before[:, ~mask])
    assert after.dtype == np.float32 and after.min() >= 0 and after.max() <= 255
    changed = np.abs(after - before).max(0) > 1
    # A seam is the border, one pixel wide; the others are everywhere.
    assert (
        changed[mask].sum() == 2 * (20 + 40) - 4
        if trace is nuisances.seam
        else (changed[mask].mean() > 0.7)
    )


def test_blur_keeps_the_mean_and_removes_detail():
    canvas = np.zeros((3, 64, 64), np.float32)
    canvas[:, ::2] = 200
    blurred = nuisances.blur(None, canvas, np.ones((64, 64), bool))
    np.testing.assert_allclose(blurred[:, 1:-1], 100, atol=1e-4)


def test_dilation_by_hand():
    mask = np.zeros((7, 7), bool)
    mask[3, 3] = True
    wide = np.zeros((7, 7), bool)
    wide[1:6, 1:6] = True
    np.testing.assert_array_equal(nuisances.dilate(mask, 2), wide)
    np.testing.assert_array_equal(nuisances.dilate(mask, 0), mask)
