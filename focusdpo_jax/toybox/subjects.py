"""Individuals of Toybox: their attributes, the split they belong to, and how scenes are disrupted.

Held-out subjects: the attribute space is divided into cells (class, hue bin, pattern, pattern hue
bin, part), and a fixed hash assigns every cell to one split. No subject of validation or test, nor
another subject of its cell, occurs in training, while every single class, hue, pattern and part
occurs in all splits. The rule applies to chosen and rejected subjects alike and does not depend on
the seed. (Two subjects of different splits may still be close to each other across the border of two
cells.)
"""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from focusdpo_jax.toybox import silhouettes

CLASSES = tuple(silhouettes.BODIES)
PATTERNS = tuple(silhouettes.PATTERNS)
PARTS = silhouettes.PARTS
ATTRIBUTES = ("class_id", "hue", "pattern", "pattern_hue", "part")
LOOKS = ATTRIBUTES[1:]  # The attributes that distinguish individuals of a class.

HUE_BINS = 12
# Smallest visible difference of hues, on a circle of length 1.
VISIBLE_HUE_DIFFERENCE = 0.15
MIN_PATTERN_CONTRAST = 0.2  # Between the hues of body and pattern.
MIN_NEIGHBOUR_CONTRAST = 0.12  # Between the body hues of a scene.


@dataclasses.dataclass(frozen=True)
class Subject:
    """One individual. `pattern` and `part` index PATTERNS and PARTS; hues are in [0, 1).

    The pattern hue of a plain subject has no effect and is stored as equal to the hue.
    """

    class_id: int
    hue: float
    pattern: int
    pattern_hue: float
    part: int

    @property
    def phrase(self) -> str:
        """The subject's noun phrase in captions: "a star"."""
        return f"a {CLASSES[self.class_id]}"


@dataclasses.dataclass(frozen=True)
class Pose:
    """A subject's pose: radius of the body in pixels, rotation in degrees, mirrored or not."""

    radius: float
    degrees: float
    mirrored: bool


def hue_distance(a: Any, b: Any) -> Any:
    """Returns the distance on the hue circle, in [0, 0.5], elementwise."""
    return abs((a - b + 0.5) % 1 - 0.5)


def visibly_different(a: Subject, b: Subject) -> bool:
    """Returns whether a viewer can distinguish two individuals of one class."""
    if a.pattern != b.pattern or a.part != b.part:
        return True
    if hue_distance(a.hue, b.hue) >= VISIBLE_HUE_DIFFERENCE:
        return True
    return PATTERNS[a.pattern] != "plain" and bool(
        hue_distance(a.pattern_hue, b.pattern_hue) >= VISIBLE_HUE_DIFFERENCE
    )


# --- Which split a subject belongs to -------------------------------------------------------------


def cell(subject: Subject) -> tuple[int, int, int, int, int]:
    """Returns a subject's cell, the unit in which the attribute space is divided among the splits."""
    plain = PATTERNS[subject.pattern] == "plain"
    pattern_bin = 0 if plain else int(subject.pattern_hue * HUE_BINS)
    return (
        subject.class_id,
        int(subject.hue * HUE_BINS),
        subject.pattern,
        pattern_bin,
        subject.part,
    )


@functools.cache
def _split_of_cell(key: tuple[int, ...]) -> str:
    byte = hashlib.blake2b(bytes(key), digest_size=1).digest()[0]
    return "train" if byte < 204 else "validation" if byte < 230 else "test"


def split_of(subject: Subject) -> str:
    """Returns the split of a subject: train (80 % of cells), validation or test."""
    return _split_of_cell(cell(subject))


def sample_subject(rng: np.random.Generator, split: str, class_id: int) -> Subject:
    """Samples an individual of a class that belongs to `split`."""
    while True:
        hue, contrast = rng.random(2).tolist()
        pattern = int(rng.integers(len(PATTERNS)))
        pattern_hue = (hue + MIN_PATTERN_CONTRAST + contrast * (1 - 2 * MIN_PATTERN_CONTRAST)) % 1
        if PATTERNS[pattern] == "plain":
            pattern_hue = hue
        subject = Subject(class_id, hue, pattern, pattern_hue, int(rng.integers(len(PARTS))))
        if split_of(subject) == split:
            return subject


def sample_subjects(
    rng: np.random.Generator, split: str, count: int, same_class_probability: float = 0.0
) -> tuple[Subject, ...]:
    """Samples the subjects of one scene, of different classes and with distinguishable body hues.

    Args:
      rng: random generator.
      split: "train", "validation" or "test".
      count: number of subjects.
      same_class_probability: probability that the first two of several subjects share a class.
    """
    classes = rng.permutation(len(CLASSES))[:count].tolist()
    if same_class_probability and count > 1 and rng.random() < same_class_probability:
        classes[1] = classes[0]
    subjects = []
    for class_id in classes:
        while True:
            subject = sample_subject(rng, split, class_id)
            if all(hue_distance(subject.hue, s.hue) >= MIN_NEIGHBOUR_CONTRAST for s in subjects):
                break
        subjects.append(subject)
    return tuple(subjects)


# --- Disruption -----------------------------------------------------------------------------------


def leaked_looks(subject: Subject, donors: tuple[Subject, ...], split: str) -> list[Subject]:
    """Returns all individuals of `split` that `subject` becomes by taking looks of one of the donors.

    All non-empty subsets of hue, pattern, pattern hue and part are tried. Results that are not visibly
    different, or whose pattern lacks contrast with the body, are left out.
    """
    leaks = []
    for donor in donors:
        for subset in range(1, 2 ** len(LOOKS)):
            looks = [getattr(donor if subset >> i & 1 else subject, n) for i, n in enumerate(LOOKS)]
            if PATTERNS[looks[1]] == "plain":
                looks[2] = looks[0]
            leak = Subject(subject.class_id, *looks)
            if leak.pattern and hue_distance(leak.hue, leak.pattern_hue) < MIN_PATTERN_CONTRAST:
                continue
            if leak not in leaks and visibly_different(leak, subject) and split_of(leak) == split:
                leaks.append(leak)
    return leaks


def changed_looks(a: Subject, b: Subject) -> tuple[str, ...]:
    """Returns the names of the looks in which two individuals differ.

    The pattern hue counts only if both are patterned; otherwise it is part of the pattern.
    """
    patterned = "plain" not in (PATTERNS[a.pattern], PATTERNS[b.pattern])
    return tuple(
        name
        for name in LOOKS
        if getattr(a, name) != getattr(b, name) and (patterned or name != "pattern_hue")
    )


def with_one_other_look(rng: np.random.Generator, subject: Subject, split: str) -> Subject | None:
    """Samples another individual of `split` that differs from `subject` visibly in exactly one look.

    Returns None if a hundred draws find none.
    """
    for _ in range(100):
        name = LOOKS[rng.integers(len(LOOKS))]
        drawn = sample_subject(rng, split, subject.class_id)
        other = dataclasses.replace(subject, **{name: getattr(drawn, name)})
        if PATTERNS[other.pattern] == "plain":
            other = dataclasses.replace(other, pattern_hue=other.hue)
        elif PATTERNS[subject.pattern] == "plain":
            other = dataclasses.replace(other, pattern_hue=drawn.pattern_hue)
        if other.pattern and hue_distance(other.hue, other.pattern_hue) < MIN_PATTERN_CONTRAST:
            continue
        if (
            changed_looks(subject, other) == (name,)
            and visibly_different(subject, other)
            and split_of(other) == split
        ):
            return other
    return None


def disrupt(
    rng: np.random.Generator,
    subjects: tuple[Subject, ...],
    split: str,
    leak_probability: float,
    one_look_probability: float = 0.0,
) -> tuple[Subject, ...]:
    """Replaces a random non-empty subset of subjects by other individuals of their classes.

    Args:
      rng: random generator.
      subjects: of the scene.
      split: to which the replacements must belong.
      leak_probability: probability that a disrupted subject takes looks of another subject of the scene,
        if there is one and the split allows it; otherwise a new individual replaces it.
      one_look_probability: probability that it differs from the subject in exactly one look, taken from
        a neighbour or new.
    """
    chosen_ones = int(rng.integers(1, 2 ** len(subjects)))
    result = []
    for slot, subject in enumerate(subjects):
        other = subject
        if chosen_ones >> slot & 1:
            donors = subjects[:slot] + subjects[slot + 1 :]
            one = bool(one_look_probability) and rng.random() < one_look_probability
            leaks = []
            if rng.random() < leak_probability:
                leaks = leaked_looks(subject, donors, split)
                if one:
                    leaks = [leak for leak in leaks if len(changed_looks(subject, leak)) == 1]
            if leaks:
                other = leaks[rng.integers(len(leaks))]
            elif one:
                other = with_one_other_look(rng, subject, split) or subject
            while not visibly_different(other, subject):
                other = sample_subject(rng, split, subject.class_id)
        result.append(other)
    return tuple(result)
