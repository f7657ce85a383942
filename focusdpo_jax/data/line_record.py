"""From a line of a manifest to a preference record: its files, checked against each other.

What cannot be used is refused here, with the field and the cure; what can be used leaves as a
record of square images (`record`), whose masks went through the same window as the images did.
"""

import dataclasses
import hashlib

import cv2
import numpy as np

from focusdpo_jax.data import geometry
from focusdpo_jax.data.images import (
    UnreadableImage,
    decode_image,
    decode_mask,
    warn_of_profiles,
)
from focusdpo_jax.data.manifest import LineError, PairLine

VISIBLE = 16
"""A pixel counts as different from this difference of a channel on: JPEG's noise stays below."""

MISSED = 0.05
"""Largest share of the visible difference that may lie outside `prior_mask`."""

KEPT = 0.5
"""Smallest share of a subject's mask that must be inside the square window."""

MAGNIFIED = 4
"""How many times an image may be enlarged."""


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """What the images of a data set have in common, in pixels.

    Attributes:
      resolution: side of chosen, rejected and the masks in them.
      reference: side of the references.
    """

    resolution: int
    reference: int


def make_record(line: PairLine, contents: dict[str, bytes], sizes: ImageSizes) -> tuple[dict, dict]:
    """The record of a line.

    Args:
      line: what the manifest says.
      contents: field to content of every file of `line.files()`.
      sizes: of the result.

    Returns:
      The record, as in `record` but for `index`, with original_size int32 [2] (height, width) and
      crop int32 [2] (top, left), as SDXL's time ids take them; and facts about it for the report.

    Raises:
      LineError: names the field, what is wrong and what would be right.
    """
    images, masks, changes = decode_files(line.files(), contents)
    chosen, rejected = images["chosen"], images["rejected"]
    shape = chosen.shape[:2]
    _same_size("rejected", rejected, shape, "chosen")
    check_resolution(shape, sizes.resolution)
    check_masks(masks, images)
    difference = _difference(chosen, rejected)
    prior, subject_masks = _masks(line, masks, difference)

    view = geometry.window(*shape, sizes.resolution, _region(prior, subject_masks))
    record = {
        "caption": line.caption,
        "chosen": view.image(chosen),
        "rejected": view.image(rejected),
        "prior_mask": _seen("prior_mask", prior, view),
        "original_size": np.array(shape, np.int32),
        "crop": np.array([view.top, view.left], np.int32),
        "subjects": [],
    }
    for i, (subject, mask) in enumerate(zip(line.subjects, subject_masks, strict=True)):
        where = f"subjects[{i}]."
        reference_mask = geometry.pad_to_square(masks[where + "reference_mask"], sizes.reference)
        if not reference_mask.any():
            raise LineError(where + "reference_mask", "is too small; mark the subject's pixels")
        mask = _seen(where + "mask", mask, view)
        record["subjects"].append(
            {
                "phrase": subject.phrase,
                "reference": geometry.pad_to_square(images[where + "reference"], sizes.reference),
                "reference_mask": reference_mask,
                "mask": mask,
                "box": geometry.mask_box(mask),
            }
        )
    return record, _facts(line, record, contents, changes)


def decode_files(files: dict[str, str], contents: dict[str, bytes]):
    """The images and masks of a line.

    Args:
      files: field to path, as `PairLine.files()`; the fields of masks end in "mask".
      contents: field to content.

    Returns:
      {field: uint8 [H, W, 3]}, {field: bool [H, W]}, and what had to be changed
      (`images.decode_image`).

    Raises:
      LineError: a file is no image.
    """
    images, masks, changes = {}, {}, []
    for field, content in contents.items():
        try:
            if field.endswith("mask"):
                masks[field] = decode_mask(content)
            else:
                images[field], changed = decode_image(content)
                warn_of_profiles(files[field], changed)
                changes.extend(changed)
        except UnreadableImage as error:
            raise LineError(field, f"= {files[field][:80]!r} {error}") from error
    return images, masks, changes


def check_masks(masks: dict[str, np.ndarray], images: dict[str, np.ndarray]) -> None:
    """Refuses a mask that is empty or of another size than its image."""
    for field, mask in masks.items():
        image = field.removesuffix("_mask") if field.endswith("reference_mask") else "chosen"
        _same_size(field, mask, images[image].shape[:2], image)
        if not mask.any():
            raise LineError(field, "is empty; make the subject's pixels white")


def check_resolution(shape: tuple[int, int], resolution: int) -> None:
    """Refuses a chosen image, of (height, width), that would be enlarged too much."""
    if min(shape) * MAGNIFIED < resolution:
        raise LineError(
            "chosen",
            f"is {_size(shape)} pixels, too small for {resolution}; give "
            f"at least {-(-resolution // MAGNIFIED)} on the shorter side",
        )


def _facts(line, record, contents, changes):
    """What the report counts, as JSON values."""
    pair = hashlib.sha256(line.caption.encode())
    for field in ("chosen", "rejected"):
        pair.update(hashlib.sha256(contents[field]).digest())
    return {
        "group": line.group or hashlib.sha256(contents["chosen"]).hexdigest(),
        "pair": pair.hexdigest(),
        "size": record["original_size"].tolist(),
        "subjects": len(record["subjects"]),
        "changes": sorted(set(changes)),
        "prior_area": round(float(record["prior_mask"].mean()), 6),
        "subject_areas": [round(float(s["mask"].mean()), 6) for s in record["subjects"]],
    }


def _difference(chosen, rejected):
    """bool [H, W], where the two differ visibly."""
    if np.array_equal(chosen, rejected):
        raise LineError("rejected", "equals chosen; a pair without a difference teaches nothing")
    difference = np.abs(chosen.astype(np.int16) - rejected).max(-1) >= VISIBLE
    if not difference.any():
        raise LineError(
            "rejected",
            f"differs from chosen nowhere by {VISIBLE} of 255 or more; "
            "nobody can see why it is rejected",
        )
    return difference


def _masks(line, masks, difference):
    """M_prior and every subject's mask in the whole image; fall-backs as in docs/data.md."""
    own = []
    for i, subject in enumerate(line.subjects):
        field = f"subjects[{i}].mask"
        mask = masks.get(field)
        if subject.box is not None:
            boxed = geometry.box_mask(subject.box, *difference.shape)
            inside = 1.0 if mask is None else (mask & boxed).sum() / mask.sum()
            if inside < KEPT:
                raise LineError(
                    f"subjects[{i}].box", f"holds {inside:.0%} of the mask; mend one of the two"
                )
            mask = boxed if mask is None else mask
        own.append(mask)
    prior, told = masks.get("prior_mask"), "prior_mask"
    if prior is None and all(mask is not None for mask in own):
        prior, told = np.any(own, axis=0), "the union of the subjects' masks"
    if prior is None:
        prior = _grown(difference)
        return prior, [prior if mask is None else mask for mask in own]
    missed = (difference & ~_grown(prior)).sum() / difference.sum()
    if missed > MISSED:
        raise LineError(
            "prior_mask",
            f"misses {missed:.0%} of where chosen and rejected differ "
            f"({told}); mark all of it, or leave all masks in the target out",
        )
    return prior, [prior if mask is None else mask for mask in own]


def _region(prior, subject_masks):
    """What the square window is centred on."""
    return np.any([prior, *subject_masks], axis=0)


def _grown(mask):
    """The mask and two pixels around it: images that were blended differ on the seam too."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


def _seen(field, mask, view):
    """The mask in the window, of which enough must be left."""
    left, top, right, bottom = np.rint(view.box).astype(int)
    kept = mask[top:bottom, left:right].sum() / mask.sum()
    if kept < KEPT:
        raise LineError(
            field,
            f"has only {kept:.0%} of its pixels inside the square that is kept of "
            "chosen; crop the images around the subjects yourself",
        )
    seen = view.mask(mask)
    if not seen.any():
        raise LineError(field, f"is too small: nothing of it is left at {view.size} pixels")
    return seen


def _same_size(field, array, shape, other):
    if array.shape[:2] != shape:
        raise LineError(
            field,
            f"is {_size(array.shape)} pixels and {other} is {_size(shape)}; give both one size",
        )


def _size(shape):
    return f"{shape[0]} x {shape[1]}"
