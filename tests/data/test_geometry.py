"""Images, masks and boxes are cropped by one window and stay aligned."""

import numpy as np
import pytest

from focusdpo_jax.data import geometry


def scene(height, width, top, left, bottom, right):
    """A white rectangle on black, and its mask."""
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255, mask


@pytest.mark.parametrize("size", [16, 48, 100])
@pytest.mark.parametrize(("height", "width"), [(97, 60), (60, 97), (64, 64), (50, 333)])
def test_mask_is_cropped_like_the_image(height, width, size):
    picture, mask = scene(height, width, 11, 17, 43, 49)
    view = geometry.window(height, width, size, mask)
    seen, small = view.image(picture), view.mask(mask)
    assert seen.shape == (size, size, 3) and small.shape == (size, size)
    # Both have the rectangle's edges at the same half of every pixel.
    wrong = (seen[..., 0] >= 128) != small
    assert wrong.sum() <= 4  # Filters differ in the corners.
    # And those are where arithmetic puts them.
    x0, y0, *_ = view.box
    expected = np.array([17 - x0, 11 - y0, 49 - x0, 43 - y0]) / view.scale / size
    np.testing.assert_allclose(geometry.mask_box(small), expected, atol=0.51 / size)


def test_window_is_the_largest_square_around_what_matters():
    _, mask = scene(60, 200, 10, 151, 20, 161)
    view = geometry.window(60, 200, 30, mask)
    assert (view.top, view.left) == (0, 63)  # The middle, 156, less half a side, halved.
    assert view.scale == 2 and view.box == (126, 0, 186, 60)
    _, mask = scene(60, 200, 10, 190, 20, 200)
    assert geometry.window(60, 200, 30, mask).left == 70  # The border.
    _, mask = scene(200, 60, 0, 0, 9, 9)
    assert geometry.window(200, 60, 30, mask).top == 0


def test_window_of_its_own_size_changes_nothing():
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    view = geometry.window(20, 20, 20, np.ones((20, 20), bool))
    np.testing.assert_array_equal(view.image(picture), picture)


def test_boxes_and_masks_are_inverse():
    box = (0.25, 0.1, 0.75, 0.9)
    mask = geometry.box_mask(box, 40, 20)
    np.testing.assert_allclose(geometry.mask_box(mask), box)
    assert geometry.box_mask((0.5, 0.5, 0.501, 0.501), 10, 10).sum() == 1


def test_references_are_padded_with_white():
    picture = np.full((20, 10, 3), 7, np.uint8)
    padded = geometry.pad_to_square(picture, 40)
    assert (padded[:, 10:30] == 7).all() and (padded[:, :10] == 255).all()
    assert (padded[:, 30:] == 255).all()
    mask = geometry.pad_to_square(np.ones((20, 10), bool), 40)
    assert mask[:, 10:30].all() and mask.sum() == 800
    assert geometry.pad_to_square(np.ones((1, 1000), bool), 8).shape == (8, 8)
