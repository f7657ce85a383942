"""The benchmark on photographs: its composites, and one match with trained weights."""

import functools

import numpy as np
import pytest
from PIL import Image

from experiments import correspondence
from tests.shared import shared


@pytest.fixture(scope="module")
def benchmark():
    return correspondence


@pytest.fixture
def photos(benchmark, tmp_path):
    """Two subjects of two photographs: a red and a green block on blue."""
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nred,block\ngreen,block\nelsewhere,dog\n\nPrompts\n"
    )
    for name, color in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        (tmp_path / name).mkdir()
        picture, mask = np.full((512, 512, 3), (0, 0, 255), np.uint8), np.zeros((512, 512), "u1")
        picture[100:300, 100:200], mask[100:300, 100:200] = color, 255
        for i in range(2):
            Image.fromarray(picture).save(tmp_path / name / f"{i:02d}.jpg", quality=100)
            Image.fromarray(mask).save(tmp_path / name / f"{i:02d}_mask.png")
    return benchmark.Photos(tmp_path)


def test_a_composite_shows_both_subjects_inside_its_masks(benchmark, photos):
    assert photos.classes == {"red": "block", "green": "block"} and photos.count("red") == 2
    picture, masks = benchmark.composite(
        photos, ("red", "green"), np.random.default_rng(0), plain=True
    )
    assert picture.shape == (448, 448, 3) and masks.shape == (2, 448, 448)
    for side, channel in enumerate((0, 1)):
        rows, columns = np.nonzero(masks[side])
        # 200 px high and half as wide, in its own half of the picture.
        assert np.ptp(rows) + 1 == pytest.approx(200, abs=3)
        assert np.ptp(columns) + 1 == pytest.approx(100, abs=3)
        assert columns.min() // 224 == columns.max() // 224 == side
        assert (picture[masks[side]].argmax(-1) == channel).mean() > 0.97
    grey = picture[~masks.any(0)]
    assert np.ptp(grey) == 0
    assert benchmark.patch_coverage(masks).sum() * 196 == pytest.approx(masks.sum(), rel=1e-4)


def test_a_painted_over_background_shows_no_subject(photos):
    picture = photos.background("red", 0).astype(int)
    assert picture[..., 0].max() < 60 and picture[..., 2].min() > 150


def test_the_share_of_matched_patches_on_the_right_subject(benchmark):
    # Features that say who is where; the second subject's left column looks like the first.
    masks = np.zeros((2, 4, 4), np.float32)
    masks[0, :, :2], masks[1, :, 2:] = 1, 1
    target = np.zeros((4, 4, 3), np.float32)
    target[:, :3, 0], target[:, 3:, 1] = 1, 1
    reference = np.zeros((4, 4, 3), np.float32)
    reference[..., 2] = 1
    seen = []
    for channel in (0, 1):
        features = reference.copy()
        features[:2] = np.eye(3)[channel]
        seen.append((features, np.repeat([[1.0], [1], [0], [0]], 4, 1).astype(np.float32)))
    one = functools.partial(benchmark.match_with_background, count=1)
    for match in (benchmark.match_with_background, one, benchmark.match_by_mean):
        inside, chance = benchmark.inside_share(match, seen, target, masks)
        # k = 4: three columns look like the first, and its first row is three hits short of one;
        # the second finds its column.
        assert inside == pytest.approx((3 / 4 + 1) / 2) and chance == 0.5


def test_the_match_of_a_dog_lies_on_the_dog_in_another_photo(benchmark):
    photos = benchmark.Photos(shared("dreambench"))
    features = benchmark.make_features(shared("dinov2-small"))
    (reference, mask), (target, other) = (photos.read("dog", i) for i in range(2))
    seen = [np.asarray(features(picture[None])[0]) for picture in (reference, target)]
    inside, chance = benchmark.inside_share(
        benchmark.match_with_background,
        [(seen[0], benchmark.patch_coverage(mask))],
        seen[1],
        benchmark.patch_coverage(other)[None],
    )
    print(inside, chance)
    assert inside > 0.9 > 2 * chance
