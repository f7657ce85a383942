"""DPCE: entropies known in closed form, borders, and image content that is not detail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.focus import complexity

local_entropy = functools.partial(
    jax.jit(complexity.local_entropy, static_argnames=("bins", "sigma")), bins=16
)


def grey(values):
    """RGB images [B, H, W, 3] from grey levels [B, H, W]."""
    return jnp.repeat(jnp.asarray(values, jnp.float32)[..., None], 3, axis=-1)


def checkerboard(size, low, high):
    rows, columns = np.indices((size, size))
    return np.where((rows + columns) % 2, low, high)[None]


def test_luminance_is_rec_601():
    image = jnp.array([[[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0]]]])
    np.testing.assert_allclose(
        complexity.luminance(image), [[[0.299, 0.587, 0.114, 1.0]]], rtol=1e-6
    )


def test_bin_membership_by_hand():
    # 4 bins: edges at 0.25, 0.5, 0.75; a ramp reaches 1 / 16 to either side of an edge.
    got = complexity.bin_membership(jnp.array([0.0, 0.1, 0.25, 0.46875, 0.6, 1.0]), 4)
    np.testing.assert_allclose(
        got,
        [
            [1, 0, 0, 0],
            [1, 0, 0, 0],
            [0.5, 0.5, 0, 0],
            [0, 0.75, 0.25, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 1],
        ],
        atol=1e-6,
    )


@pytest.mark.parametrize("level", [0.0, 0.25, 0.26, 0.4, 0.5, 1.0])
def test_a_flat_image_has_no_detail_at_any_grey_level(level):
    entropy = local_entropy(grey(np.full((1, 32, 32), level)), sigma=4.0)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)


def test_faint_noise_on_a_bin_edge_is_nearly_flat():
    rng = np.random.default_rng(0)
    noise = rng.integers(-1, 2, (1, 32, 32)) / 255  # one 8-bit step up or down
    entropy = local_entropy(grey(0.5 + noise), sigma=4.0)
    assert float(entropy.max()) < 0.02  # hard bins: log 2 / log 16 = 0.25


def test_a_checkerboard_of_two_greys_has_entropy_log_two():
    image = grey(checkerboard(32, low=0.1, high=0.9))
    entropy = local_entropy(image, sigma=4.0)
    np.testing.assert_allclose(entropy[:, 12:-12, 12:-12], np.log(2) / np.log(16), rtol=1e-4)


def test_uniform_noise_is_near_one_and_above_the_checkerboard():
    rng = np.random.default_rng(0)
    entropy = local_entropy(grey(rng.uniform(size=(1, 32, 32))), sigma=4.0)
    assert 0.85 < float(entropy.mean()) < 0.95


def test_a_step_edge_has_detail_at_the_edge_and_none_far_away():
    image = np.zeros((1, 8, 64))
    image[..., 32:] = 1.0
    entropy = local_entropy(grey(image), sigma=3.0)
    assert float(entropy[0, 4, 32]) > 0.24  # p is nearly one half: log 2 / log 16 = 0.25
    assert float(entropy[0, :, :16].max()) < 1e-4
    # Two pixels beyond the edge, by hand: the dark share of a Gaussian window is known.
    offsets = np.arange(-34, 30)
    dark = np.exp(-0.5 * (offsets / 3.0) ** 2)
    dark = dark[offsets < -2].sum() / dark.sum()
    expected = -(dark * np.log(dark) + (1 - dark) * np.log(1 - dark)) / np.log(16)
    np.testing.assert_allclose(entropy[0, 4, 34], expected, rtol=1e-4)


def test_the_window_is_renormalised_at_the_border():
    window = complexity.gaussian_window(9, 2.0)
    np.testing.assert_allclose(window.sum(axis=1), 1, rtol=1e-6)
    assert window[0, 0] == pytest.approx(1 / np.exp(-0.5 * (np.arange(9) / 2) ** 2).sum())


def test_rows_and_columns_are_blurred_alike():
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(1, 8, 12))
    wide = local_entropy(grey(image), sigma=1.5)
    tall = local_entropy(grey(image.transpose(0, 2, 1)), sigma=1.5)
    np.testing.assert_allclose(wide, tall.transpose(0, 2, 1), atol=1e-6)


def test_normalise_inside_scales_by_the_largest_value_inside_the_prior():
    detail = jnp.array([[[0.1, 0.4, 0.8]], [[0.001, 0.002, 0.9]], [[0.2, 0.3, 0.6]]])
    prior = jnp.array([[[1.0, 1.0, 0.0]], [[1.0, 1.0, 0.0]], [[1.0, 1.0, 0.25]]])
    np.testing.assert_allclose(
        complexity.normalise_inside(detail, prior),
        [
            [[0.25, 1.0, 1.0]],  # outside the prior it is cut off at 1
            [[0.0, 0.0, 0.0]],  # a flat subject stays flat
            [[2 / 3, 1.0, 1.0]],  # a border patch counts by its share: 0.6 * 0.25 < 0.3
        ],
        rtol=1e-6,
    )


def test_an_empty_prior_has_no_detail():
    out = complexity.normalise_inside(jnp.ones((1, 2, 2)), jnp.zeros((1, 2, 2)))
    np.testing.assert_array_equal(out, 0)


def test_complexity_prefers_the_textured_half_of_a_subject():
    image = np.full((1, 32, 32), 0.1)
    image[:, :, 16:] = checkerboard(32, 0.1, 0.9)[:, :, 16:]
    prior = jnp.ones((1, 8, 8)).at[:, :2].set(0.0)
    detail = complexity.complexity(grey(image), prior, sigma=2.0)
    assert detail.shape == (1, 8, 8)
    np.testing.assert_allclose(detail[:, :, :2], 0, atol=1e-3)
    np.testing.assert_allclose(detail[:, 2:, 6:], 1, atol=0.02)
    assert float((detail * prior).max()) == 1.0


def test_colour_entropy_has_edges_that_luminance_ignores():
    # Red and green of equal luma: 0.299 * 1 = 0.587 * 0.50937.
    red, green = np.array([1.0, 0, 0]), np.array([0, 0.299 / 0.587, 0])
    board = checkerboard(32, 0, 1)[..., None]
    image = jnp.asarray(board * red + (1 - board) * green, jnp.float32)
    np.testing.assert_allclose(local_entropy(image, sigma=4.0), 0, atol=1e-4)
    coloured = jax.jit(complexity.local_entropy, static_argnums=(1, 2, 3))(image, 16, 4.0, True)
    # Two of three channels have two equally frequent levels: log 2 each, of log 16.
    np.testing.assert_allclose(coloured, 2 / 3 * np.log(2) / np.log(16), rtol=0.01)


def test_colour_entropy_of_a_grey_image_equals_that_of_its_luminance():
    image = grey(np.random.default_rng(0).uniform(size=(1, 16, 16)))
    coloured = jax.jit(complexity.local_entropy, static_argnums=(1, 2, 3))(image, 16, 2.0, True)
    np.testing.assert_allclose(coloured, local_entropy(image, sigma=2.0), atol=1e-5)


def test_reference_complexity_is_the_mean_entropy_inside_the_mask():
    plain, board = np.full((32, 32), 0.4), checkerboard(32, 0.1, 0.9)[0]
    half = np.arange(32)[None, :] < 16
    references = grey(np.stack([plain, board, np.where(half, plain, board)]))[None]
    masks = np.stack([np.ones((32, 32), bool), half & half.T, np.zeros((32, 32), bool)])[None]
    found = jax.jit(complexity.reference_complexity, static_argnums=(2, 3))(
        references, masks, 16, 2.0
    )
    # Two equally frequent levels have an entropy of log 2. The last mask is empty.
    np.testing.assert_allclose(found, [[0, np.log(2) / np.log(16), 0]], rtol=0.01, atol=1e-6)


def test_detail_is_scaled_by_the_relative_complexity_of_the_references():
    detail = jnp.array([[[0.8, 0.4, 0.6, 0.5]]])
    # Subjects on the first and on the second location, both on half of the third, none on the last.
    masks = jnp.array([[[[1.0, 0.0, 0.5, 0.0]], [[0.0, 0.25, 0.5, 0.0]]]])
    found = complexity.scale_by_reference(detail, masks, jnp.array([[0.1, 0.4]]))
    # Relative complexities 1/4 and 1; 5/8 in the mean.
    np.testing.assert_allclose(found, [[[0.2, 0.4, 0.375, 0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(
        complexity.scale_by_reference(detail, masks, jnp.zeros((1, 2))), detail
    )
