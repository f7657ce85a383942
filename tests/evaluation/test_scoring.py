"""Similarities, crops and regions, with encoders whose outputs are known."""

import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.evaluation import scoring
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.vision import regions
from focusdpo_jax.vision.regions import Region

RED, GREEN, BLUE = np.eye(3, dtype=np.uint8) * 255


class Colors:
    """The mean colour of what is not white, as a unit vector."""

    name, digest = "dinov2", "colors"

    def __call__(self, pictures):
        means = [np.mean(p[(p < 255).any(-1)], axis=0) for p in pictures]
        return np.stack([mean / np.linalg.norm(mean) for mean in means])


def block(color, size=(8, 8)):
    return np.broadcast_to(color, (*size, 3)).astype(np.uint8)


@pytest.fixture
def subjects(tmp_path):
    """A red and a green one, the second with a photograph that is half blue and masked there."""
    files = {}
    for name, color in (("red", RED), ("green", GREEN)):
        picture = block(color).copy()
        if name == "green":
            picture[:4] = BLUE
            mask = np.zeros((8, 8), np.uint8)
            mask[4:] = 255
            Image.fromarray(mask).save(tmp_path / "green_mask.png")
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        files[name] = str(tmp_path / f"{name}.png")
    return tuple(BenchmarkSubject(n, n, f, (f,)) for n, f in files.items())


def test_one_subject(subjects):
    scene = BenchmarkScene("a", "", subjects[:1], 0, "red")
    mixed = block((30, 40, 0))
    score = scoring.SimilarityScorer(Colors()).score([scene], [mixed], [[Region((0, 0, 1, 1))]])
    assert score == [{"dinov2": pytest.approx(0.6)}]


def test_subjects_without_a_region_are_missing(subjects):
    several, alone = (BenchmarkScene("a", "", s, 0, "") for s in (subjects, subjects[:1]))
    scores = scoring.MissingScorer("found so").score(
        [several, alone], [None] * 2, [[None, Region((0, 0, 1, 1))], [None]]
    )
    assert scores == [{"missing": [1.0, 0.0]}, {}]


def test_two_subjects_in_their_regions_and_swapped(subjects):
    scene = BenchmarkScene("a", "", subjects, 0, "red+green")
    picture = np.concatenate([block(RED), block(GREEN)], axis=1)
    halves = [Region((0, 0, 0.5, 1)), Region((0.5, 0, 1, 1))]
    scorer = scoring.SimilarityScorer(Colors())
    right, swapped, lost = scorer.score(
        [scene] * 3, [picture] * 3, [halves, halves[::-1], [None, halves[1]]]
    )
    # The whole image is (1, 1, 0) / sqrt 2; green's photograph (0, 1, 1) / sqrt 2.
    assert right["dinov2"] == pytest.approx((np.sqrt(0.5) + 0.5) / 2)
    # The margin of a box takes in a row of the neighbour's, 1 in 10 columns at most.
    assert right["dinov2_crop"] == pytest.approx([1, 1], abs=0.02)
    assert right["dinov2_leakage"] == pytest.approx([-1, -1], abs=0.15)
    assert swapped["dinov2_leakage"] == pytest.approx([1, 1], abs=0.15)
    assert lost["dinov2_crop"][0] is None and lost["dinov2_leakage"][0] is None
    assert lost["dinov2_crop"][1] == right["dinov2_crop"][1]


def test_a_crop_is_square_and_white_outside_mask_and_image():
    picture = block(BLUE, (10, 20))
    mask = np.zeros((10, 20), bool)
    mask[0:10, 4:8] = True
    cut = regions.crop_subject(picture, Region.from_mask(mask))
    assert cut.shape == (11, 11, 3)
    assert (cut == BLUE).all(-1).sum() == 40
    assert regions.crop_subject(picture, None).shape == (20, 20, 3)


def test_subjects_are_found_by_their_patches():
    draw = np.random.default_rng(0)
    features = 0.3 * draw.normal(size=(16, 16, 8))
    features[..., 0] += 1  # The background.
    prototypes = np.eye(8)[[1, 2, 3]]
    features[2:6, 3:8] += 4 * prototypes[0]
    features[9:14, 1:5] += 4 * prototypes[1]
    features[12, 12] += 4 * prototypes[0]  # A stray patch.
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    boxes = regions.find_regions(features, prototypes)
    assert boxes[0] == (3 / 16, 2 / 16, 8 / 16, 6 / 16)
    assert boxes[1] == (1 / 16, 9 / 16, 5 / 16, 14 / 16)
    assert boxes[2] is None


def test_a_prototype_is_that_of_the_masked_patches():
    features = np.stack([np.tile(np.eye(2)[0], (4, 1)), np.tile(np.eye(2)[1], (4, 1))])
    features = features.repeat(2, axis=0)
    mask = np.zeros((8, 8), bool)
    mask[4:] = True
    np.testing.assert_allclose(regions.subject_prototype(features, mask), [0, 1])
    np.testing.assert_allclose(regions.subject_prototype(features, None), [np.sqrt(0.5)] * 2)
