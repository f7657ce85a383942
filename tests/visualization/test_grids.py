"""Layout and columns of image grids, and colours of focus maps."""

import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.errors import UserError
from focusdpo_jax.visualization import grids

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(color):
    return np.full((32, 32, 3), color, np.uint8)


def boxes_of(page, color):
    """x0, x1 and y0, y1 (exclusive) of the pixels of exactly one colour."""
    rows, columns = np.nonzero((page == color).all(-1))
    return columns.min(), columns.max() + 1, rows.min(), rows.max() + 1


def row(**fields):
    return grids.PreferenceRow(
        "a star", [flat(RED)], chosen=flat(GREEN), rejected=flat(BLUE), **fields
    )


def test_tiles_stand_side_by_side_magnified():
    page = grids.preference_grid([row()])
    assert page.dtype == np.uint8
    chosen, rejected = boxes_of(page, GREEN), boxes_of(page, BLUE)
    assert chosen[1] - chosen[0] == chosen[3] - chosen[2] == 64  # Twice 32.
    assert rejected[1] - rejected[0] == 64 and rejected[2:] == chosen[2:]
    assert 0 < rejected[0] - chosen[1] <= 8  # A thin gap.
    assert boxes_of(page, RED)[1] <= chosen[0]
    # Nearest: no mixed colours inside, so that exactly the tile has its colour.
    assert (page == GREEN).all(-1).sum() == 64 * 64


def test_columns_without_images_are_left_out():
    width = lambda *rows: grids.preference_grid(list(rows)).shape[1]
    column = 64 + 4
    assert width(row(policy=flat(RED))) == width(row()) + column
    # One row is enough for a column; the others leave a blank there.
    assert width(row(), row(policy=flat(RED))) == width(row()) + column
    full = row(base=flat(RED), policy=flat(RED), focus=np.ones((8, 8)))
    assert width(full) == width(row()) + 3 * column


def test_every_row_has_its_place_and_captions_show():
    pages = [grids.preference_grid([row()] * n) for n in (1, 2, 3)]
    heights = [page.shape[0] for page in pages]
    assert heights[2] - heights[1] == heights[1] - heights[0] >= 64 + 13
    assert (pages[2] == BLUE).all(-1).sum() == 3 * 64 * 64
    below = pages[0][boxes_of(pages[0], GREEN)[3] :]
    assert (below < 100).all(-1).sum() > 20  # Dark pixels: text.


def test_a_long_caption_is_cut_to_the_page():
    long = grids.SampleRow("a star and " * 30, [flat(RED)], flat(BLUE))
    short = grids.SampleRow("a star", [flat(RED)], flat(BLUE))
    page = grids.sample_grid([long])
    assert page.shape == grids.sample_grid([short]).shape
    assert (page[:, -8:] == 255).all()  # The margin stays empty.


def test_a_caption_of_several_lines_is_one_line():
    lines, line = (
        grids.sample_grid([grids.SampleRow(text, [flat(RED)], flat(BLUE))])
        for text in ("a star\non  sand", "a star on sand")
    )
    np.testing.assert_array_equal(lines, line)


def test_sample_grid_fills_rows_first():
    rows = [
        grids.SampleRow("a star", [flat(RED)] * n, flat(c))
        for n, c in ((1, GREEN), (2, BLUE), (1, (9, 9, 9)))
    ]
    page = grids.sample_grid(rows, columns=2)
    first, second, third = (boxes_of(page, c) for c in (GREEN, BLUE, (9, 9, 9)))
    assert second[0] > first[1] and second[2] == first[2]
    assert third[0] == first[0] and third[2] > first[3]


def test_focus_grid_has_a_column_for_each_map():
    def focus(subjects, **maps):
        fields = dict.fromkeys(("matched", "unmatched", "detail", "uncertainty")) | maps
        return grids.FocusRow(
            "t000-249",
            [flat(RED)] * subjects,
            flat(GREEN),
            [np.eye(4) - 2] * subjects,
            weights=np.eye(2),
            **fields,
        )

    full = {name: np.eye(8) for name in ("matched", "unmatched", "detail", "uncertainty")}
    width = lambda *rows: grids.focus_grid(rows).shape[1]  # noqa: E731
    column = 64 + 4
    # A subject more is a reference and a similarity more.
    assert width(focus(2, **full)) == width(focus(1, **full)) + 2 * column
    assert width(focus(1)) == width(focus(1, **full)) - 4 * column
    assert width(focus(1), focus(1, detail=np.eye(8))) == width(focus(1)) + column
    # The order of a similarity shows whatever its sign: its least value is the scale's dark end.
    page = grids.focus_grid([focus(1)])
    green = boxes_of(page, GREEN)
    similarity = page[green[2] : green[3], green[1] + 4 : green[1] + 68]
    dark = grids.heat(np.zeros((1, 1)), flat(GREEN))[0, 0]
    np.testing.assert_array_equal(similarity[0, -1], dark)
    assert similarity[0, 0].sum() > similarity[0, -1].sum() + 300


def test_heat_is_monotonic_and_keeps_positions():
    weights = np.linspace(0, 2, 16).reshape(4, 4)
    grey = np.full((32, 32, 3), 128, np.uint8)
    picture = grids.heat(weights, grey)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    cells = luma.reshape(4, 8, 4, 8)
    assert np.ptp(cells, axis=(1, 3)).max() == 0  # Magnified without smoothing.
    assert (np.diff(cells[:, 0, :, 0].ravel()) > 0).all()
    # 0.7 of the darkest and lightest colour, 0.3 of the grey.
    np.testing.assert_array_equal(picture[0, 0], np.rint(0.7 * np.array([4, 4, 22]) + 38.4))
    np.testing.assert_array_equal(picture[-1, -1], np.rint(0.7 * np.array([252, 252, 190]) + 38.4))
    # Its own maximum is the scale, and zero is zero.
    np.testing.assert_array_equal(grids.heat(weights * 7, grey), picture)
    assert (grids.heat(np.zeros((4, 4)), grey) == picture[0, 0]).all()


def test_heat_shows_the_image_in_grey():
    image = flat(RED)
    image[:, 16:] = GREEN
    picture = grids.heat(np.zeros((3, 3)), image).astype(int)  # 3 does not divide 32.
    # Green is lighter than red: luma 149.7 and 76.2, times 0.3.
    assert abs((picture[0, 20] - picture[0, 5]) - 0.3 * 255 * (0.587 - 0.299)).max() <= 1


def test_save_png(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    path = tmp_path / "new" / "page.png"
    grids.save_png(path, flat(RED))
    grids.save_png(str(path), image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["page.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*page.png.*folder"):
        grids.save_png(tmp_path / "file" / "page.png", image)
