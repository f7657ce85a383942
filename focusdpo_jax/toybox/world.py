"""Toybox worlds: scenes of subjects with known attributes, as preference records.

A *subject* has a class (its outline), a body hue, a pattern with its own hue, and a small part. A
*reference* shows it alone on white. A *scene* shows one to three subjects on a background, of
different classes unless `same_class_probability` is set. Its caption has the classes and the
background but no looks, so that identity comes from the references alone. The *rejected* scene is the
same image with some subjects disrupted: same class, pose and position, another individual, which may
have a look that leaked from its neighbour. The disrupted region may also have an inpainting artefact:
blur, tint, a seam or grain.

Records depend only on the settings and on `(seed, split, index)`. NumPy only.
"""

import dataclasses

import numpy as np

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.errors import UserError
from focusdpo_jax.toybox import backgrounds, nuisances
from focusdpo_jax.toybox.rendering import (
    Crop,
    bounding_box,
    covered_pixels,
    find_offsets,
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
_MARGIN = 3  # Dilation of "dilated" and "box" prior masks, in pixels at resolution 64.


def caption(subjects: tuple[Subject, ...], background: int) -> str:
    """Returns the caption: classes in order and the background: "a star, a ball and a heart on sand"."""
    phrases = [s.phrase for s in subjects]
    names = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{names} on {BACKGROUNDS[background]}"


def vocabulary() -> tuple[str, ...]:
    """Returns every token of every caption: words, and the comma."""
    return tuple(sorted({"a", "and", "on", ",", *CLASSES, *BACKGROUNDS}))


# --- Worlds ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """The settings of a Toybox world; `record` returns its records, in any order.

    Attributes:
      seed: of the records; which subjects are held out does not depend on it.
      resolution: side of all images, in pixels.
      count_probabilities: probabilities of scenes with 1, 2, ... subjects; at most three.
      leak_probability: probability that a disrupted subject has looks of another subject of its scene.
      subject_radii: largest radius of a subject's body in scenes of 1, 2 and 3 subjects, in pixels at
        resolution 64; all subjects of a scene shrink until they fit.
      pattern_scale: magnification of patterns.
      same_class_probability: probability that a scene of several has two subjects of one class.
      one_look_probability: probability that a disrupted subject differs in one look alone.
      nuisance_probability: probability that a rejected image has an inpainting artefact (`nuisances`)
        inside all of the prior mask.
      prior_mask: form of a disrupted subject's prior mask: "exact", "dilated" by 3 pixels at resolution
        64, or the "box" around that.
      oracle_mask: whether a record's prior mask is its changed mask, the truth that real data lacks; the
        images are the same.
      second_reference_probability: probability that one subject of a scene with a free slot has a second
        reference, in the last slot.

    Raises:
      UserError: a value is out of its range.
    """

    seed: int = 0
    resolution: int = 64
    count_probabilities: tuple[float, ...] = (0.2, 0.4, 0.4)
    leak_probability: float = 0.5
    subject_radii: tuple[float, ...] = (21.0, 17.0, 14.5)
    pattern_scale: float = 1.1
    same_class_probability: float = 0.0
    one_look_probability: float = 0.0
    nuisance_probability: float = 0.0
    prior_mask: str = "exact"
    oracle_mask: bool = False
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
        """Returns the record at `index` (any non-negative integer) of a split.

        Returns:
          A dict:
            index: int. caption: str. background: int, an index into BACKGROUNDS.
            chosen, rejected: uint8 [R, R, 3].
            prior_mask: bool [R, R], the pixels that a disrupted subject covers in either image, or a larger
              region, depending on the world's `prior_mask`; outside it the two images are equal. With
              `oracle_mask`, the changed mask.
            changed_mask: bool [R, R], the pixels that differ because of other looks, without those changed
              by nuisances.
            subjects: a list of dicts, in the order of the caption; a second reference of a subject is a
              further dict that differs in the reference alone:
              phrase: str. reference: uint8 [R, R, 3]. reference_mask, mask: bool [R, R], the pixels that
                the subject covers in its reference and in `chosen`.
              box: float32 [4], bounds of `mask` as x0, y0, x1, y1 in [0, 1].
              class_id, hue, pattern, pattern_hue, part: as in `Subject`; and `rejected_<name>` of each,
                for the individual in `rejected`. disrupted: bool, whether that is another individual.

        Raises:
          UserError: there is no such split.
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
            other = to_uint8(nuisances.apply_random(rng, rejected, prior_mask))
        return {
            "index": index,
            "caption": caption(subjects, background),
            "background": background,
            "chosen": chosen,
            "rejected": other,
            "prior_mask": changed_mask if self.oracle_mask else prior_mask,
            "changed_mask": changed_mask,
            "subjects": entries,
        }

    def _region(self, mask: Mask) -> Mask:
        """Returns the prior mask of a disrupted subject that covers the pixels of `mask`."""
        if self.prior_mask == "exact":
            return mask
        mask = nuisances.dilate(mask, round(_MARGIN * self.resolution / 64))
        if self.prior_mask == "dilated":
            return mask
        return np.any(mask, axis=1)[:, None] & np.any(mask, axis=0)

    def _arrange(
        self, rng: np.random.Generator, subjects: tuple[Subject, ...], others: tuple[Subject, ...]
    ) -> tuple[list[list[Crop]], list[tuple[int, int]]]:
        """Draws poses and offsets of a scene; both individuals of a slot share pose and offset."""
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
                offsets = find_offsets(rng, groups, self.resolution)
                if offsets is not None:
                    return groups, offsets
            largest *= 0.95  # The shapes do not fit into one image: shrink them.


# --- Visualization --------------------------------------------------------------------------------


def contact_sheet(records: list[dict]) -> RGBImage:
    """Draws one row a record: references, chosen, rejected, prior mask; uint8 [height, width, 3]."""
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
