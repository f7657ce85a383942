"""Toybox worlds: scenes of subjects with exactly known looks, as preference records.

A *subject* has a class (its outline), a body hue, a pattern with a hue of its own and a small part.
A *reference* shows it alone on white. A *scene* shows one to three subjects on a background, of
different classes unless the world has scenes with two of one class; its caption names classes and
background but no looks, so that identity can come from the references alone. The *rejected* scene is
the same picture with some subjects disrupted: same class, pose and place, another individual, which may
wear a look leaked from its neighbour. The disrupted region may also carry what inpainting leaves: a
blur, a tint, a seam or a grain.

Everything is determined by `(seed, split, index)`. Needs numpy and nothing else.
"""

import dataclasses

import numpy as np

from focusdpo_jax.errors import UserError
from focusdpo_jax.toybox import backgrounds, nuisances
from focusdpo_jax.toybox.rendering import (
    bounding_box,
    covered_pixels,
    find_places,
    paste,
    render_reference,
    render_subject,
    to_uint8,
    trim,
)
from focusdpo_jax.toybox.subjects import (
    CLASSES,
    Pose,
    Subject,
    disrupt,
    sample_subjects,
)

SPLITS = ("train", "validation", "test")
BACKGROUNDS = tuple(backgrounds.PAINTERS)
PRIOR_MASKS = ("exact", "dilated", "box")
_MARGIN = 3  # By which a generous prior mask is wider than a subject, in pixels of 64.


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
            raise UserError(
                f"subject_radii is {self.subject_radii}; give one above 0 for each number of "
                f"subjects, up to {len(self.count_probabilities)}"
            )
        if self.prior_mask not in PRIOR_MASKS:
            raise UserError(
                f"prior_mask is {self.prior_mask!r}; choose one of {', '.join(PRIOR_MASKS)}"
            )
        total = sum(self.count_probabilities)
        if not 1 <= len(self.count_probabilities) <= 3 or abs(total - 1) > 1e-6:
            raise UserError(
                f"count_probabilities is {self.count_probabilities}; "
                "give one to three probabilities that add up to 1"
            )

    @property
    def max_subjects(self) -> int:
        """Largest number of subjects of a scene."""
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
            paste(chosen, crop, offset)
            paste(rejected, other_crop, offset)
            mask = covered_pixels(crop, offset, self.resolution)
            disrupted = other is not subject
            if disrupted:
                prior_mask |= self._region(
                    mask | covered_pixels(other_crop, offset, self.resolution)
                )
            reference, reference_mask = render_reference(
                rng, subject, self.resolution, self.pattern_scale
            )
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
        if (
            self.second_reference_probability
            and count < self.max_subjects
            and rng.random() < self.second_reference_probability
        ):
            slot = rng.integers(count)
            reference, reference_mask = render_reference(
                rng, subjects[slot], self.resolution, self.pattern_scale
            )
            entries.append(
                entries[slot] | {"reference": reference, "reference_mask": reference_mask}
            )
        chosen, other = to_uint8(chosen), to_uint8(rejected)
        changed_mask = (chosen != other).any(-1)
        if self.nuisance_probability and rng.random() < self.nuisance_probability:
            other = to_uint8(nuisances.leave(rng, rejected, prior_mask))
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
                groups.append(
                    trim(
                        crop,
                        crop
                        if other is subject
                        else render_subject(other, pose, self.pattern_scale),
                    )
                )
            for _ in range(10):
                offsets = find_places(rng, groups, self.resolution)
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
