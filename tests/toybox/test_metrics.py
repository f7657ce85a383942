"""Every rule of the metrics, on scenes whose counts can be checked by hand."""

import types

import numpy as np
import pytest

from focusdpo_jax import toybox
from focusdpo_jax.toybox import metrics as toybox_metrics

PLAIN, STRIPES, DOTS = (toybox.PATTERNS.index(name) for name in ("plain", "stripes", "dots"))
NAN = np.nan

# Class 2 is plain and green, class 5 dotted red on blue. Their parts differ.
GREEN = {"class_id": 2, "hue": 0.33, "pattern": PLAIN, "pattern_hue": 0.33, "part": 0}
BLUE = {"class_id": 5, "hue": 0.66, "pattern": DOTS, "pattern_hue": 0.98, "part": 1}


def truth_of(*scenes, slots=3):
    """Truth and presence of scenes, each a list of subjects; all backgrounds are 1."""
    truth = {name: np.full((len(scenes), slots), -1.0 if "hue" in name else -1) for name in GREEN}
    for b, scene in enumerate(scenes):
        for s, subject in enumerate(scene):
            for name, value in subject.items():
                truth[name][b, s] = value
    truth["background"] = np.ones(len(scenes), int)
    return truth, truth["class_id"] >= 0


def readings_of(*scenes, classes=6):
    """Readings of images that show the given subjects, each on 6 % of the image."""
    fields = {
        name: np.zeros((len(scenes), classes), float if "hue" in name else int)
        for name in GREEN
        if name != "class_id"
    }
    area = np.zeros((len(scenes), classes))
    cells = np.full((len(scenes), 16, 16), -1)
    for b, scene in enumerate(scenes):
        for s, subject in enumerate(scene):
            area[b, subject["class_id"]] = subject.get("area", 0.06)
            cells[b, 5 * s : 5 * s + 4, :4] = subject["class_id"]
            for name in fields:
                fields[name][b, subject["class_id"]] = subject[name]
    return types.SimpleNamespace(
        area=area, cells=cells, background=np.ones(len(scenes), int), **fields
    )


def measure_one(shown, asked):
    """Metrics of one scene, without the batch axis."""
    truth, present = truth_of(asked, slots=2)
    result = toybox_metrics.compute(readings_of(shown), truth, present)
    return {name: values[0] for name, values in result.items()}


def test_a_perfect_scene():
    result = measure_one([GREEN, BLUE], [GREEN, BLUE])
    for name in ("fidelity", "hue", "pattern", "part"):
        np.testing.assert_array_equal(result[name], [1, 1], err_msg=name)
    for name in ("leakage", "hue_leakage", "missing", "repeated"):
        np.testing.assert_array_equal(result[name], [0, 0], err_msg=name)
    np.testing.assert_array_equal(result["pattern_hue"], [NAN, 1])  # A plain one has none.
    assert result["class_accuracy"] == result["background_accuracy"] == 1


def test_readings_follow_the_class_not_the_slot():
    result = measure_one([GREEN, BLUE], [BLUE, GREEN])
    np.testing.assert_array_equal(result["fidelity"], [1, 1])
    np.testing.assert_array_equal(result["pattern_hue"], [1, NAN])


def test_hues_are_compared_on_a_circle_with_a_tolerance_of_30_degrees():
    # 0.98 and 0.05 are 0.07 apart; 0.33 and 0.42 are 0.09 apart, more than 1/12.
    result = measure_one([GREEN | {"hue": 0.42}, BLUE | {"pattern_hue": 0.05}], [GREEN, BLUE])
    np.testing.assert_array_equal(result["hue"], [0, 1])
    np.testing.assert_array_equal(result["pattern_hue"], [NAN, 1])
    np.testing.assert_allclose(result["fidelity"], [2 / 3, 1])


def test_fidelity_counts_four_attributes_of_a_patterned_subject():
    shown = BLUE | {"part": 3, "pattern_hue": 0.2}
    assert measure_one([shown], [BLUE])["fidelity"][0] == 2 / 4


def test_a_subject_shown_plain_has_no_pattern_hue_to_match():
    # The probe still reads some pattern hue; here it happens to be the right one.
    result = measure_one([BLUE | {"pattern": PLAIN}], [BLUE])
    assert result["pattern_hue"][0] == 0
    assert result["fidelity"][0] == 2 / 4


def test_a_missing_subject_has_no_fidelity_and_does_not_leak():
    smudge = GREEN | {"area": 0.011, "hue": 0.66}
    result = measure_one([smudge, BLUE], [GREEN, BLUE])
    np.testing.assert_array_equal(result["missing"], [1, 0])
    np.testing.assert_array_equal(result["fidelity"], [0, 1])
    np.testing.assert_array_equal(result["part"], [0, 1])
    np.testing.assert_array_equal(result["leakage"], [NAN, 0])
    np.testing.assert_array_equal(result["hue_leakage"], [NAN, 0])
    assert result["class_accuracy"] == 0
    assert measure_one([GREEN | {"area": 0.013}], [GREEN])["missing"][0] == 0


@pytest.mark.parametrize(
    "change, leaks, hue_leaks",
    [
        ({"hue": 0.70}, 1, 1),  # Within 1/12 of the neighbour's 0.66.
        ({"hue": 0.90}, 0, 0),  # Wrong, but nobody's.
        ({"pattern": DOTS}, 1, 0),
        ({"pattern": STRIPES}, 0, 0),
        ({"part": 1}, 1, 0),
        ({"part": 3}, 0, 0),
        # A plain subject has no pattern hue to lose, even under another pattern.
        ({"pattern": STRIPES, "pattern_hue": 0.98}, 0, 0),
    ],
)
def test_leakage_is_a_neighbours_attribute_instead_of_its_own(change, leaks, hue_leaks):
    result = measure_one([GREEN | change, BLUE], [GREEN, BLUE])
    np.testing.assert_array_equal(result["leakage"], [leaks, 0])
    np.testing.assert_array_equal(result["hue_leakage"], [hue_leaks, 0])


def test_a_hue_within_tolerance_of_both_counts_as_its_own():
    # 0.39 is 0.06 from both.
    result = measure_one([GREEN | {"hue": 0.39}, BLUE], [GREEN, BLUE | {"hue": 0.45}])
    assert result["hue"][0] == 1 and result["hue_leakage"][0] == 0


def test_shared_values_are_not_leaks():
    twin = BLUE | {"hue": 0.33, "pattern": PLAIN, "pattern_hue": 0.33, "part": 0}
    np.testing.assert_array_equal(measure_one([GREEN, twin], [GREEN, twin])["leakage"], [0, 0])


def test_pattern_hue_leaks_between_patterned_subjects():
    striped = GREEN | {"pattern": STRIPES, "pattern_hue": 0.1}
    leaking = measure_one([striped | {"pattern_hue": 0.95}, BLUE], [striped, BLUE])
    np.testing.assert_array_equal(leaking["leakage"], [1, 0])
    # A plain neighbour's stored pattern hue is its body hue and no look of its own.
    plain = BLUE | {"pattern": PLAIN, "pattern_hue": 0.66}
    other = measure_one([striped | {"pattern_hue": 0.66}, plain], [striped, plain])
    np.testing.assert_array_equal(other["leakage"], [0, 0])


def test_an_absent_neighbour_is_still_a_source_of_leaks():
    result = measure_one([GREEN | {"hue": 0.66}], [GREEN, BLUE])
    np.testing.assert_array_equal(result["missing"], [0, 1])
    np.testing.assert_array_equal(result["hue_leakage"], [1, NAN])


def test_leakage_needs_a_neighbour():
    result = measure_one([GREEN | {"hue": 0.66, "part": 1}], [GREEN])
    np.testing.assert_array_equal(result["leakage"], [NAN, NAN])
    np.testing.assert_allclose(result["fidelity"], [1 / 3, NAN])


def test_scene_metrics_and_empty_rows():
    truth, present = truth_of([GREEN], [GREEN], [GREEN], [BLUE])
    readings = readings_of([GREEN], [GREEN, BLUE], [GREEN, BLUE | {"area": 0.011}], [BLUE])
    readings.background[:] = [1, 0, 1, 1]
    present[3] = False  # As for a row that only fills up a batch.
    result = toybox_metrics.compute(readings, truth, present)
    np.testing.assert_array_equal(result["class_accuracy"], [1, 0, 1, NAN])
    np.testing.assert_array_equal(result["background_accuracy"], [1, 0, 1, NAN])
    assert all(np.isnan(values[3]).all() for values in result.values())
    assert result["fidelity"].shape == (4, 3)


def test_scenes_with_two_of_a_class_are_left_out():
    twin = GREEN | {"hue": 0.6}
    truth, present = truth_of([GREEN, twin, BLUE], [GREEN, BLUE])
    shown = readings_of([GREEN, BLUE], [GREEN, BLUE])
    result = toybox_metrics.compute(shown, truth, present)
    for name, values in result.items():
        assert np.isnan(values[0]).all(), name
    np.testing.assert_array_equal(result["fidelity"][1], [1, 1, NAN])
    assert result["class_accuracy"][1] == 1


def test_perfect_readings_give_perfect_metrics_and_rejected_scenes_leak():
    """On records of the world itself, with readings made of their truth."""
    world = toybox.World(seed=3)
    records = [world.record("validation", i) for i in range(30)]
    names = toybox.ATTRIBUTES
    chosen = [[{n: s[n] for n in names} for s in r["subjects"]] for r in records]
    rejected = [[{n: s["rejected_" + n] for n in names} for s in r["subjects"]] for r in records]
    truth, present = truth_of(*chosen)
    classes = len(toybox.CLASSES)
    clean = toybox_metrics.compute(readings_of(*chosen, classes=classes), truth, present)
    wrong = toybox_metrics.compute(readings_of(*rejected, classes=classes), truth, present)
    assert np.nanmean(clean["fidelity"]) == 1 and np.nanmean(clean["leakage"]) == 0
    assert np.nanmean(wrong["missing"]) == 0 and np.nanmean(wrong["class_accuracy"]) == 1
    disrupted = np.array(
        [
            [s < len(r["subjects"]) and r["subjects"][s]["disrupted"] for s in range(3)]
            for r in records
        ]
    )
    # Whoever was disrupted looks different, whoever was not does not, and only the first can leak.
    np.testing.assert_array_equal(wrong["fidelity"][present] < 1, disrupted[present])
    assert not np.nansum(wrong["leakage"][~disrupted])
    assert np.nansum(wrong["leakage"]) > 5


def test_regions_are_counted_by_class_and_size():
    image = np.full((1, 8, 8), -1)
    image[0, 0, :3] = 2  # Connected to the next by a corner.
    image[0, 1:4, 3] = 2
    image[0, 6:8, 6:8] = 2
    image[0, 5, 0] = 2  # Too small.
    image[0, 6:8, 0:3] = 1
    image[0, 6:8, 3:5] = 3  # Beside the region of class 1, and not part of it.
    two = image.repeat(2, axis=0)
    two[1] = -1
    counts = toybox_metrics.count_regions(two, 4, min_area=2 / 64)
    np.testing.assert_array_equal(counts, [[0, 1, 2, 1], [0, 0, 0, 0]])


def test_a_subject_drawn_twice_is_repeated():
    truth, present = truth_of([GREEN, BLUE], slots=3)
    readings = readings_of([GREEN, BLUE])
    readings.cells[0, 10:14, 10:14] = GREEN["class_id"]
    result = toybox_metrics.compute(readings, truth, present)
    np.testing.assert_array_equal(result["repeated"], [[1, 0, NAN]])
