"""Toybox: a procedural world of subjects with exactly known looks, for training and measuring.

A *subject* has a class (its outline), a body hue, a pattern with a hue of its own and a small part.
A *reference* shows it alone on white. A *scene* shows one to three subjects on a background, of
different classes unless the world has scenes with two of one class; its caption names classes and
background but no looks, so that identity can come from the references alone. The *rejected* scene is
the same picture with some subjects disrupted: same class, pose and place, another individual, which may
wear a look leaked from its neighbour. The disrupted region may also carry what inpainting leaves: a
blur, a tint, a seam or a grain.

Everything is determined by `(seed, split, index)`. Needs numpy and nothing else.

Held-out subjects: the looks are divided into cells (class, hue bin, pattern, pattern hue bin, part)
and a fixed hash gives every cell to one split. So no subject of validation or test, nor another of
its cell, is ever seen in training, while every single class, hue, pattern and part occurs in all
splits. The rule binds chosen and rejected subjects alike and does not depend on the seed. (Two
subjects of different splits may still be near each other across the border of two cells.)
"""

import colorsys
import dataclasses
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from focusdpo_jax.data import backgrounds, nuisances, silhouettes
from focusdpo_jax.errors import UserError

SPLITS = ("train", "validation", "test")
CLASSES = tuple(silhouettes.BODIES)
PATTERNS = tuple(silhouettes.PATTERNS)
PARTS = silhouettes.PARTS
BACKGROUNDS = tuple(backgrounds.PAINTERS)
ATTRIBUTES = ("class_id", "hue", "pattern", "pattern_hue", "part")
LOOKS = ATTRIBUTES[1:]  # What tells one individual of a class from another.

HUE_BINS = 12
# Hues this far apart (on a circle of length 1) are seen as different.
VISIBLE_HUE_DIFFERENCE = 0.15
MIN_PATTERN_CONTRAST = 0.2  # Between the hues of body and pattern.
MIN_NEIGHBOUR_CONTRAST = 0.12  # Between the body hues of a scene.

_SATURATION, _VALUE = 0.85, 0.95
# Parts and outlines are neutral, so that the hues stay readable.
_WHITE, _INK = (250, 250, 250), (32, 30, 38)
_OUTLINE = 0.09  # Its width, in radii.
_REACH = 1.5  # No part of a subject is further from its middle, in radii.
PRIOR_MASKS = ("exact", "dilated", "box")
_MARGIN = 3  # By which a generous prior mask is wider than a subject, in pixels of 64.


@dataclasses.dataclass(frozen=True)
class Subject:
    """One individual. `pattern` and `part` index PATTERNS and PARTS; hues lie in [0, 1).

    The pattern hue of a plain subject has no effect and is stored as equal to the hue.
    """

    class_id: int
    hue: float
    pattern: int
    pattern_hue: float
    part: int

    @property
    def phrase(self) -> str:
        return f"a {CLASSES[self.class_id]}"


@dataclasses.dataclass(frozen=True)
class Pose:
    """How a subject stands: radius of the body in pixels, rotation in degrees, mirrored or not."""

    radius: float
    degrees: float
    mirrored: bool


def hue_distance(a, b):
    """Distance on the hue circle, in [0, 0.5]; works on arrays."""
    return abs((a - b + 0.5) % 1 - 0.5)


def visibly_different(a: Subject, b: Subject) -> bool:
    """Whether a viewer can tell two individuals of one class apart."""
    if a.pattern != b.pattern or a.part != b.part:
        return True
    if hue_distance(a.hue, b.hue) >= VISIBLE_HUE_DIFFERENCE:
        return True
    return PATTERNS[a.pattern] != "plain" and bool(
        hue_distance(a.pattern_hue, b.pattern_hue) >= VISIBLE_HUE_DIFFERENCE
    )


# --- Which split a subject belongs to -------------------------------------------------------------


def cell(subject: Subject) -> tuple[int, int, int, int, int]:
    """The cell of looks that holds a subject; the unit in which looks are given to splits."""
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
    """The one split that a subject may occur in: train (80 % of cells), validation or test."""
    return _split_of_cell(cell(subject))


def sample_subject(rng: np.random.Generator, split: str, class_id: int) -> Subject:
    """Draws an individual of a class, among those that belong to `split`."""
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
    """Draws the subjects of one scene: different classes, body hues that can be told apart.

    With `same_class_probability` the first two subjects of several are of one class.
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
    """Every individual of `split` that `subject` becomes by wearing looks of one of the donors.

    All non-empty subsets of hue, pattern, pattern hue and part are tried. Only visible changes count,
    and body and pattern keep their contrast.
    """
    leaks = []
    for donor in donors:
        for subset in range(1, 2 ** len(LOOKS)):
            wears = [getattr(donor if subset >> i & 1 else subject, n) for i, n in enumerate(LOOKS)]
            if PATTERNS[wears[1]] == "plain":
                wears[2] = wears[0]
            leak = Subject(subject.class_id, *wears)
            if leak.pattern and hue_distance(leak.hue, leak.pattern_hue) < MIN_PATTERN_CONTRAST:
                continue
            if leak not in leaks and visibly_different(leak, subject) and split_of(leak) == split:
                leaks.append(leak)
    return leaks


def changed_looks(a: Subject, b: Subject) -> tuple[str, ...]:
    """Names of the looks in which two individuals differ.

    The pattern hue counts where both are patterned; otherwise it comes and goes with the pattern.
    """
    patterned = "plain" not in (PATTERNS[a.pattern], PATTERNS[b.pattern])
    return tuple(name for name in LOOKS if getattr(a, name) != getattr(b, name)
                 and (patterned or name != "pattern_hue"))


def with_one_other_look(rng: np.random.Generator, subject: Subject, split: str) -> Subject | None:
    """Another individual of `split` that differs from `subject` in one look, visibly.

    Returns None where a hundred draws find none.
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
        if (changed_looks(subject, other) == (name,) and visibly_different(subject, other)
                and split_of(other) == split):
            return other
    return None


def disrupt(
    rng: np.random.Generator, subjects: tuple[Subject, ...], split: str, leak_probability: float,
    one_look_probability: float = 0.0,
) -> tuple[Subject, ...]:
    """Replaces a random non-empty subset of subjects by other individuals of their classes.

    With `leak_probability` a disrupted subject wears looks of another subject of the scene, where
    there is one and the split allows it; otherwise a new individual takes its place. With
    `one_look_probability` it differs from the subject in one look alone, a neighbour's or a new one.
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


# --- Rendering ------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """A painted subject: colour float32 [3, N, M] in [0, 255], coverage float32 [N, M] in [0, 1].

    Colour planes come first in this file alone: numpy is faster on them.
    """

    color: np.ndarray
    coverage: np.ndarray


@functools.lru_cache(4096)
def _rgb(hue: float) -> tuple[float, float, float]:
    return tuple(255 * c for c in colorsys.hsv_to_rgb(hue, _SATURATION, _VALUE))


def render_subject(subject: Subject, pose: Pose, pattern_scale: float = 1.0) -> Crop:
    """Paints one subject on a square crop whose size depends on the pose's radius alone.

    So the crops of two individuals in one pose lie on each other. Edges are antialiased by distance:
    coverage falls from one to zero over one pixel. `pattern_scale` enlarges the pattern alone.
    """
    radius = np.float32(pose.radius)
    half = int(np.ceil(_REACH * pose.radius)) + 1
    pixels = np.arange(-half, half + 1, dtype=np.float32) / radius
    angle = np.deg2rad(pose.degrees)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = (cos * pixels)[None, :] + (sin * pixels)[:, None]
    y = (cos * pixels)[:, None] - (sin * pixels)[None, :]
    if pose.mirrored:
        x = -x

    def covered(distance):
        share = distance * -radius
        share += 0.5
        return np.clip(share, 0, 1, out=share)

    name, part = CLASSES[subject.class_id], PARTS[subject.part]
    anchor = silhouettes.ANCHORS[name][part]
    body = silhouettes.BODIES[name](x, y)
    coverage = covered(body)
    fill = covered(body + _OUTLINE)  # What is covered and not filled is ink.
    white = np.zeros_like(fill)
    if part == "eyes":
        whites = silhouettes.eyes(x, y, anchor)
        rim = covered(whites - _OUTLINE)  # Sets the whites off from light bodies.
        coverage = np.maximum(coverage, rim)
        fill = fill * (1 - rim)
        white = np.maximum(covered(whites) - covered(silhouettes.pupils(x, y, anchor)), 0)
    else:
        shape = covered(getattr(silhouettes, part)(x, y, anchor))
        coverage = np.maximum(coverage, shape)
        if part == "hat":  # Worn in front; handle and legs are attached behind.
            fill = fill * (1 - shape)

    pattern = silhouettes.PATTERNS[PATTERNS[subject.pattern]]
    share = np.zeros_like(fill)
    if pattern:
        scale = np.float32(pattern_scale)
        share = covered(scale * pattern(x / scale, y / scale))
    # Every pixel mixes four colours; the shares add up to one.
    palette = np.array([_rgb(subject.hue), _rgb(subject.pattern_hue), _WHITE, _INK], np.float32)
    light = fill * (1 - 0.05 * y)  # Lit from above.
    second = light * share
    shares = np.stack([light - second, second, white, 1 - fill - white])
    color = np.minimum(palette.T @ shares.reshape(4, -1), 255)
    return Crop(color.reshape(3, *fill.shape), coverage)


def _trim(*crops: Crop) -> list[Crop]:
    """Cuts crops of one pose to the smallest rectangle that holds all that any of them covers."""
    touched = sum(crop.coverage for crop in crops) > 0
    rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return [Crop(crop.color[:, *box], crop.coverage[box]) for crop in crops]


def _window(crop: Crop, offset: tuple[int, int]) -> tuple[slice, slice]:
    """The part of a picture under a crop whose first pixel lies at `offset` (row, column)."""
    height, width = crop.coverage.shape
    return slice(offset[0], offset[0] + height), slice(offset[1], offset[1] + width)


def _paste(canvas: np.ndarray, crop: Crop, offset: tuple[int, int]) -> None:
    """Blends a crop into a canvas, float32 [3, R, R], in place."""
    view = canvas[:, *_window(crop, offset)]
    view += crop.coverage * (crop.color - view)


def _mask(crop: Crop, offset: tuple[int, int], resolution: int) -> np.ndarray:
    """Every pixel of the picture that a crop touches, bool [resolution, resolution]."""
    mask = np.zeros((resolution, resolution), bool)
    mask[_window(crop, offset)] = crop.coverage > 0
    return mask


def _to_uint8(canvas: np.ndarray) -> np.ndarray:
    """From a canvas to an image, uint8 [R, R, 3]."""
    return np.ascontiguousarray(np.rint(canvas).astype(np.uint8).transpose(1, 2, 0))


def bounding_box(mask: np.ndarray) -> np.ndarray:
    """Bounds of a bool mask [H, W] as float32 (x0, y0, x1, y1) in [0, 1]; x1 and y1 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array(
        [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height],
        np.float32,
    )


def _random_offset(rng: np.random.Generator, crop: Crop, resolution: int) -> tuple[int, int]:
    """A uniform place at which a crop lies inside the picture."""
    height, width = crop.coverage.shape
    return int(rng.integers(resolution - height + 1)), int(rng.integers(resolution - width + 1))


def render_reference(
    rng: np.random.Generator, subject: Subject, resolution: int, pattern_scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A subject alone on white: image uint8 [R, R, 3] and mask bool [R, R]."""
    radius = rng.uniform(17, 21) * resolution / 64
    pose = Pose(radius, rng.uniform(-25, 25), bool(rng.integers(2)))
    (crop,) = _trim(render_subject(subject, pose, pattern_scale))
    offset = _random_offset(rng, crop, resolution)
    canvas = np.full((3, resolution, resolution), 255, np.float32)
    _paste(canvas, crop, offset)
    return _to_uint8(canvas), _mask(crop, offset, resolution)


def _place(
    rng: np.random.Generator, groups: list[list[Crop]], resolution: int
) -> list[tuple[int, int]] | None:
    """Offsets at which crops of different groups share no pixel and do not touch; None if not found.

    The crops of a group are of one size and go to one place.
    """
    free = np.ones((resolution + 2, resolution + 2), bool)  # With a border of one pixel.
    offsets = []
    for group in groups:
        touched = np.any([crop.coverage > 0 for crop in group], 0)
        height, width = touched.shape
        if max(height, width) > resolution:
            return None
        for _ in range(30):
            row, column = _random_offset(rng, group[0], resolution)
            if free[row + 1 : row + 1 + height, column + 1 : column + 1 + width][touched].all():
                break
        else:
            return None
        offsets.append((row, column))
        for r, c in (
            (1, 1),
            (0, 1),
            (2, 1),
            (1, 0),
            (1, 2),
        ):  # Its own pixels and their neighbours.
            free[row + r : row + r + height, column + c : column + c + width] &= ~touched
    return offsets


def caption(subjects: tuple[Subject, ...], background: int) -> str:
    """Names classes in order and the background, no looks: "a star, a ball and a heart on sand"."""
    phrases = [s.phrase for s in subjects]
    names = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{names} on {BACKGROUNDS[background]}"


def vocabulary() -> tuple[str, ...]:
    """Every token of every caption: words, and the comma."""
    return tuple(sorted({"a", "and", "on", ",", *CLASSES, *BACKGROUNDS}))


# --- Worlds ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """The settings of a Toybox world; `record` gives its records one by one, in any order.

    Attributes:
      seed: another seed, other records; which subjects are held out does not depend on it.
      resolution: side of all images, in pixels.
      count_probabilities: chance of a scene with 1, 2, ... subjects; at most three.
      leak_probability: chance that a disrupted subject wears looks of another subject of its scene.
      subject_radii: largest radius of a subject's body in scenes of 1, 2 and 3 subjects, in pixels of 64; all
        of a scene become smaller where they find no place.
      pattern_scale: enlarges patterns.
      same_class_probability: chance that a scene of several has two subjects of one class.
      one_look_probability: chance that a disrupted subject differs in one look alone.
      nuisance_probability: chance that a rejected image has a trace of inpainting (`nuisances`) over
        all of the prior mask.
      prior_mask: that of a disrupted subject: "exact", "dilated" by 3 pixels of 64, or the "box"
        around that.
      second_reference_probability: chance that one subject of a scene with a free slot has a second
        reference, which comes last.
    """

    seed: int = 0
    resolution: int = 64
    count_probabilities: tuple[float, ...] = (0.2, 0.4, 0.4)
    leak_probability: float = 0.5
    subject_radii: tuple[float, ...] = (14, 13, 11.5)
    pattern_scale: float = 1.0
    same_class_probability: float = 0.0
    one_look_probability: float = 0.0
    nuisance_probability: float = 0.0
    prior_mask: str = "exact"
    second_reference_probability: float = 0.0

    def __post_init__(self):
        if self.resolution < 32:
            raise UserError(f"resolution is {self.resolution}; Toybox needs at least 32 pixels")
        if len(self.subject_radii) < len(self.count_probabilities) or min(self.subject_radii) <= 0:
            raise UserError(f"subject_radii is {self.subject_radii}; give one above 0 for each number of "
                            f"subjects, up to {len(self.count_probabilities)}")
        if self.prior_mask not in PRIOR_MASKS:
            raise UserError(f"prior_mask is {self.prior_mask!r}; choose one of {', '.join(PRIOR_MASKS)}")
        total = sum(self.count_probabilities)
        if not 1 <= len(self.count_probabilities) <= 3 or abs(total - 1) > 1e-6:
            raise UserError(
                f"count_probabilities is {self.count_probabilities}; "
                "give one to three probabilities that add up to 1"
            )

    @property
    def max_subjects(self) -> int:
        return len(self.count_probabilities)

    def record(self, split: str, index: int) -> dict:
        """The record at `index` (any non-negative integer) of a split.

        Returns a dict:
          index: int. caption: str. background: int, an index into BACKGROUNDS.
          chosen, rejected: uint8 [R, R, 3].
          prior_mask: bool [R, R], the pixels that a disrupted subject touches in either image, or more
            where the world's `prior_mask` is generous; outside it the two images are equal.
          changed_mask: bool [R, R], the pixels in which another look changes the image; without what
            nuisances change.
          subjects: a list of dicts, in the order of the caption; a second reference of a subject is a
            further dict, equal but for the reference:
            phrase: str. reference: uint8 [R, R, 3]. reference_mask, mask: bool [R, R], the pixels that
              the subject touches in its reference and in `chosen`.
            box: float32 [4], bounds of `mask` as x0, y0, x1, y1 in [0, 1].
            class_id, hue, pattern, pattern_hue, part: as in `Subject`; and `rejected_<name>` of each,
              for the individual that `rejected` shows. disrupted: bool, whether that is another one.
        """
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        rng = np.random.default_rng((self.seed, SPLITS.index(split), index))
        count = 1 + int(rng.choice(self.max_subjects, p=self.count_probabilities))
        subjects = sample_subjects(rng, split, count, self.same_class_probability)
        others = disrupt(rng, subjects, split, self.leak_probability, self.one_look_probability)
        background = int(rng.integers(len(BACKGROUNDS)))
        groups, offsets = self._arrange(rng, subjects, others)

        chosen = backgrounds.paint(rng, BACKGROUNDS[background], self.resolution)
        rejected = chosen.copy()
        prior_mask = np.zeros((self.resolution, self.resolution), bool)
        entries = []
        for subject, other, (crop, other_crop), offset in zip(subjects, others, groups, offsets):
            _paste(chosen, crop, offset)
            _paste(rejected, other_crop, offset)
            mask = _mask(crop, offset, self.resolution)
            disrupted = other is not subject
            if disrupted:
                prior_mask |= self._region(mask | _mask(other_crop, offset, self.resolution))
            reference, reference_mask = render_reference(
                rng, subject, self.resolution, self.pattern_scale)
            entries.append(
                {
                    "phrase": subject.phrase,
                    "reference": reference,
                    "reference_mask": reference_mask,
                    "mask": mask,
                    "box": bounding_box(mask),
                    "disrupted": disrupted,
                    **vars(subject),
                    **{f"rejected_{name}": value for name, value in vars(other).items()},
                }
            )
        if (self.second_reference_probability and count < self.max_subjects
                and rng.random() < self.second_reference_probability):
            slot = rng.integers(count)
            reference, reference_mask = render_reference(
                rng, subjects[slot], self.resolution, self.pattern_scale)
            entries.append(entries[slot] | {"reference": reference, "reference_mask": reference_mask})
        chosen, other = _to_uint8(chosen), _to_uint8(rejected)
        changed_mask = (chosen != other).any(-1)
        if self.nuisance_probability and rng.random() < self.nuisance_probability:
            other = _to_uint8(nuisances.leave(rng, rejected, prior_mask))
        return {
            "index": index,
            "caption": caption(subjects, background),
            "background": background,
            "chosen": chosen,
            "rejected": other,
            "prior_mask": prior_mask,
            "changed_mask": changed_mask,
            "subjects": entries,
        }

    def _region(self, mask):
        """The prior mask of a disrupted subject that touches the pixels of a mask."""
        if self.prior_mask == "exact":
            return mask
        mask = nuisances.dilated(mask, round(_MARGIN * self.resolution / 64))
        return mask.any(1)[:, None] & mask.any(0) if self.prior_mask == "box" else mask

    def _arrange(self, rng, subjects, others):
        """Poses and places the subjects of a scene; both individuals of a slot share pose and place."""
        largest = self.subject_radii[len(subjects) - 1] * self.resolution / 64
        while True:
            groups = []
            for subject, other in zip(subjects, others):
                pose = Pose(
                    rng.uniform(0.85, 1) * largest, rng.uniform(-15, 15), bool(rng.integers(2))
                )
                crop = render_subject(subject, pose, self.pattern_scale)
                groups.append(_trim(crop, crop if other is subject else render_subject(
                    other, pose, self.pattern_scale)))
            for _ in range(10):
                offsets = _place(rng, groups, self.resolution)
                if offsets is not None:
                    return groups, offsets
            largest *= (
                0.95  # These shapes are too bulky for one picture: paint them a little smaller.
            )


# --- Looking at it --------------------------------------------------------------------------------


def contact_sheet(records: list[dict]) -> np.ndarray:
    """One row a record: references | chosen | rejected | prior mask; uint8 [height, width, 3]."""
    size = len(records[0]["chosen"])
    columns = max(len(r["subjects"]) for r in records)
    blank = np.full((size, size, 3), 255, np.uint8)
    rows = []
    for record in records:
        tiles = [s["reference"] for s in record["subjects"]]
        tiles += [blank] * (columns - len(tiles))
        mask = np.repeat(record["prior_mask"][..., None], 3, -1).astype(np.uint8) * 255
        tiles += [record["chosen"], record["rejected"], mask]
        rows.append(np.concatenate([np.pad(t, ((1, 1), (1, 1), (0, 0))) for t in tiles], 1))
    return np.concatenate(rows, 0)
