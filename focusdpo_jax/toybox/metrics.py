"""Metrics of generated Toybox scenes, computed from the probe's readings.

Every metric is an array of values in [0, 1], one per subject ([B, S]) or one per scene ([B]), with
NaN where the metric is not defined. A metric's mean is the mean of its defined values; `statistics`
computes its confidence interval by resampling scenes. NumPy and SciPy only.

The probe reads one subject per class, so subjects are identified by their class. Scenes with two
subjects of one class are excluded from all metrics.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64
from scipy import ndimage

from focusdpo_jax.toybox.subjects import PATTERNS, hue_distance

MIN_AREA = 0.012
"""Fraction of the image that a class must cover to count as present, [ours].

A rendered subject covers 5 to 16 % of its image, antialiased edges included. 1.2 % of 64 x 64 is 49
pixels, three of the probe's 16 x 16 cells; less is treated as noise."""

HUE_TOLERANCE = 1 / 12
"""Largest distance of equal hues on the hue circle of length 1 (30 degrees), [ours].

Subjects of a scene have body hues at least 0.12 apart, so a hue can be within tolerance of two of
them; it then counts as the subject's own."""

LOWER_IS_BETTER = frozenset({"missing", "repeated", "leakage", "hue_leakage"})
"""The metrics that count errors; for all others, higher is better."""

_PLAIN = PATTERNS.index("plain")


def compute(
    readings: Any,
    truth: Mapping[str, Any],
    present: Bool[Any, "B S"],
    *,
    min_area: float = MIN_AREA,
    hue_tolerance: float = HUE_TOLERANCE,
) -> dict[str, Float64[np.ndarray, "B ..."]]:
    """Compares B images with the ground truth of their scenes.

    Args:
      readings: `probe.Readings` of the images, with fields convertible to NumPy.
      truth: dict with `class_id`, `hue`, `pattern`, `pattern_hue`, `part`, each [B, S], of the
        subjects of the references, and `background` [B]; as `PreferenceBatch.truth`.
      present: bool [B, S], which slots hold a subject. Rows without subjects, and rows with two
        subjects of one class, are excluded from all metrics: clear padding rows of a batch with
        `present & (index >= 0)[:, None]`.
      min_area: smallest fraction of the image at which a class counts as present.
      hue_tolerance: largest distance of equal hues, on a circle of length 1.

    Returns:
      dict of float64 arrays, NaN where not defined. For each subject, [B, S]:
        fidelity: fraction of its attributes that match its reference: hue, pattern, part and, if it
          is patterned, pattern hue. 0 for a missing subject.
        leakage: 1 if it has an attribute of another subject of the scene instead of its own: the
          reading matches the other's value and not its own. Defined for subjects that are found, in
          scenes of two or more. Part of it is chance: a wrong pattern or part often equals a
          neighbour's.
        hue_leakage: the same for the body hue alone. Chance is low: a random wrong hue is within
          tolerance of a given neighbour's with a probability of 1/6.
        missing: 1 if its class is not present.
        repeated: 1 if its class covers two or more separate regions, each of at least `min_area`.
          Defined for subjects that are found.
        hue, pattern, part, pattern_hue: 1 if the attribute matches, 0 for a missing subject;
          pattern_hue is defined for patterned subjects, and 0 if the image shows a plain one.
      For each scene, [B]:
        class_accuracy: 1 if the image shows the classes of its caption and no others.
        background_accuracy: 1 if the image shows the background of its caption.
    """
    present = np.asarray(present, bool)
    own = {name: np.asarray(values) for name, values in truth.items()}
    same = own["class_id"][:, :, None] == own["class_id"][:, None, :]
    twins = np.triu(same & present[:, :, None] & present[:, None, :], 1).any((1, 2))
    present = present & ~twins[:, None]
    class_id = np.where(present, own["class_id"], 0)
    area = np.asarray(readings.area)

    def of_subjects(per_class):
        """Selects from [B, classes] the readings of each slot's class, [B, S]."""
        return np.take_along_axis(np.asarray(per_class), class_id, axis=1)

    regions = count_regions(readings.cells, area.shape[1], min_area)
    found = present & (of_subjects(area) >= min_area)
    predicted = {
        name: of_subjects(getattr(readings, name))
        for name in ("hue", "pattern", "pattern_hue", "part")
    }
    patterned = present & (own["pattern"] != _PLAIN)

    def matches(name, value):
        """Compares readings [B, S] with values that broadcast to [B, S] or [B, S, others]."""
        reading = predicted[name].reshape(predicted[name].shape + (1,) * (value.ndim - 2))
        if name in ("pattern", "part"):
            return reading == value
        return hue_distance(reading, value) <= hue_tolerance

    match = {name: found & matches(name, own[name]) for name in predicted}
    shows_pattern = predicted["pattern"] != _PLAIN
    match["pattern_hue"] &= patterned & shows_pattern
    right = sum(match[name].astype(int) for name in match)

    # [B, S, S]: subject s has an attribute of subject o instead of its own.
    pairs = found[:, :, None] & present[:, None, :]
    leaked = {
        name: pairs & matches(name, own[name][:, None, :]) & ~match[name][:, :, None]
        for name in predicted
    }
    # Both subjects must be patterned, or there is no pattern hue to leak.
    leaked["pattern_hue"] &= (patterned & shows_pattern)[:, :, None] & patterned[:, None, :]
    leaking = {name: leaked[name].any(-1) for name in leaked}

    in_scene = present.any(1)
    with_others = found & (present.sum(1) >= 2)[:, None]
    expected = np.zeros(area.shape, bool)
    rows, columns = np.nonzero(present)
    expected[rows, class_id[rows, columns]] = True
    return {
        "fidelity": _where(present, right / (3 + patterned)),
        "leakage": _where(with_others, np.any(list(leaking.values()), axis=0)),
        "hue_leakage": _where(with_others, leaking["hue"]),
        "missing": _where(present, ~found),
        "repeated": _where(found, of_subjects(regions) >= 2),
        "class_accuracy": _where(in_scene, ((area >= min_area) == expected).all(1)),
        "background_accuracy": _where(
            in_scene, np.asarray(readings.background) == own["background"]
        ),
        "hue": _where(present, match["hue"]),
        "pattern": _where(present, match["pattern"]),
        "pattern_hue": _where(patterned, match["pattern_hue"]),
        "part": _where(present, match["part"]),
    }


def count_regions(
    cells: Int[Any, "B g g"], classes: int, min_area: float
) -> Int64[np.ndarray, "B classes"]:
    """Counts the connected regions of each class; cells are adjacent also by their corners.

    Args:
      cells: int [B, g, g], the class at each cell, -1 for none.
      classes: number of classes.
      min_area: smallest fraction of the image that a region covers to be counted.
    """
    cells = np.asarray(cells)
    counts = np.zeros((len(cells), classes), np.int64)
    for image, class_id in np.ndindex(counts.shape):
        labels, _ = ndimage.label(cells[image] == class_id, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.reshape(-1))[1:]  # Label 0 is the rest of the image.
        counts[image, class_id] = (sizes >= min_area * labels.size).sum()
    return counts


def _where(defined: np.ndarray, values: np.ndarray) -> Float64[np.ndarray, "..."]:
    """Returns the values as float64, NaN where they are not defined."""
    return np.where(defined, np.asarray(values, np.float64), np.nan)
