"""What is right and wrong about generated Toybox scenes, counted from the probe's readings.

Every measure is an array of values in [0, 1], one a subject ([B, S]) or one a scene ([B]), and NaN
where the measure is not defined. A measure's mean is the mean of its defined values; `statistics`
puts an interval around it by resampling scenes. numpy only.

The probe reads one subject a class, so a subject is found by its class. A second copy of a subject goes
unnoticed, and scenes with two subjects of one class are left out of all measures.
"""

import numpy as np

from focusdpo_jax.toybox.subjects import PATTERNS, hue_distance

MIN_AREA = 0.012
"""Share of the image that a class must cover to count as shown, [ours].

A rendered subject touches 5 to 16 % of its image's pixels, a few less at its core; 1.2 % of
64 x 64 is 49 pixels, three of the probe's 16 x 16 cells. Less is taken for a smudge."""

HUE_TOLERANCE = 1 / 12
"""Hues at most this far apart on their circle (30 degrees) count as equal, [ours].

Neighbours in a scene have body hues at least 0.12 apart, so that one hue can be within tolerance
of both; it then counts as the subject's own."""

LOWER_IS_BETTER = frozenset({"missing", "leakage", "hue_leakage"})
"""The measures of mistakes; of all others, more is better."""

_PLAIN = PATTERNS.index("plain")


def compute(readings, truth, present, *, min_area=MIN_AREA, hue_tolerance=HUE_TOLERANCE):
    """Compares B images with what they should show.

    Args:
      readings: `probe.Readings` of the images, its fields convertible to numpy.
      truth: dict with `class_id`, `hue`, `pattern`, `pattern_hue`, `part`, each [B, S], of the
        subjects of the references, and `background` [B]; as `PreferenceBatch.truth`.
      present: bool [B, S], which slots hold a subject. Rows without any, and rows with two subjects of
        one class, are left out of all measures: clear those that only fill up a batch, `present & (index >= 0)[:, None]`.
      min_area: share of the image from which on a class counts as shown.
      hue_tolerance: largest distance of hues, on a circle of length 1, that count as equal.

    Returns:
      dict of float64 arrays, NaN where not defined. For each subject, [B, S]:
        fidelity: share of its attributes that match its reference: hue, pattern, part and, if it
          is patterned, pattern hue. 0 for a missing subject.
        leakage: whether it wears an attribute of another subject of the scene instead of its own:
          the reading matches the other's value and not its own. Defined for subjects that are
          found, in scenes of two or more. Some of it is chance: a wrong pattern or part often is a
          neighbour's.
        hue_leakage: the same for the body hue alone. Chance is low here: a wrong hue at random is
          within tolerance of a given neighbour's with a probability of 1/6.
        missing: whether its class is not shown.
        hue, pattern, part, pattern_hue: whether the attribute matches, no for a missing subject;
          pattern_hue for patterned subjects alone, and never matched by a plain one.
      For each scene, [B]:
        class_accuracy: whether it shows the classes of its caption and no others.
        background_accuracy: whether it shows the background of its caption.
    """
    present = np.asarray(present, bool)
    own = {name: np.asarray(values) for name, values in truth.items()}
    same = own["class_id"][:, :, None] == own["class_id"][:, None, :]
    twins = np.triu(same & present[:, :, None] & present[:, None, :], 1).any((1, 2))
    present = present & ~twins[:, None]
    class_id = np.where(present, own["class_id"], 0)
    area = np.asarray(readings.area)

    def of_subjects(per_class):
        """From [B, classes] to [B, S]: the readings of the class that each slot should show."""
        return np.take_along_axis(np.asarray(per_class), class_id, axis=1)

    found = present & (of_subjects(area) >= min_area)
    seen = {
        name: of_subjects(getattr(readings, name))
        for name in ("hue", "pattern", "pattern_hue", "part")
    }
    patterned = present & (own["pattern"] != _PLAIN)

    def matches(name, value):
        """Whether readings [B, S] match values that broadcast to them or to [B, S, others]."""
        reading = seen[name].reshape(seen[name].shape + (1,) * (value.ndim - 2))
        if name in ("pattern", "part"):
            return reading == value
        return hue_distance(reading, value) <= hue_tolerance

    match = {name: found & matches(name, own[name]) for name in seen}
    shows_pattern = seen["pattern"] != _PLAIN
    match["pattern_hue"] &= patterned & shows_pattern
    right = sum(match[name].astype(int) for name in match)

    # [B, S, S]: subject s wears what belongs to subject o. Where o is s, it wears its own.
    pairs = found[:, :, None] & present[:, None, :]
    worn = {
        name: pairs & matches(name, own[name][:, None, :]) & ~match[name][:, :, None]
        for name in seen
    }
    # Only patterned subjects have a pattern hue, to give as well as to lose.
    worn["pattern_hue"] &= (patterned & shows_pattern)[:, :, None] & patterned[:, None, :]
    leaking = {name: worn[name].any(-1) for name in worn}

    in_scene = present.any(1)
    with_others = found & (present.sum(1) >= 2)[:, None]
    asked = np.zeros(area.shape, bool)
    rows, columns = np.nonzero(present)
    asked[rows, class_id[rows, columns]] = True
    return {
        "fidelity": _where(present, right / (3 + patterned)),
        "leakage": _where(with_others, np.any(list(leaking.values()), axis=0)),
        "hue_leakage": _where(with_others, leaking["hue"]),
        "missing": _where(present, ~found),
        "class_accuracy": _where(in_scene, ((area >= min_area) == asked).all(1)),
        "background_accuracy": _where(
            in_scene, np.asarray(readings.background) == own["background"]
        ),
        "hue": _where(present, match["hue"]),
        "pattern": _where(present, match["pattern"]),
        "pattern_hue": _where(patterned, match["pattern_hue"]),
        "part": _where(present, match["part"]),
    }


def _where(defined, values):
    """The values as float64, NaN where not defined."""
    return np.where(defined, np.asarray(values, np.float64), np.nan)
