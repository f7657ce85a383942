"""Builds a preference record from a line of a manifest and the content of its files.

Lines that cannot be used raise `LineError` with the field and the cure. The others become records
of square images (`record`); masks are cropped by the same window as the images.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import cv2
import numpy as np

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.data import geometry
from focusdpo_jax.data.images import (
    UnreadableImage,
    decode_image,
    decode_mask,
    warn_of_profiles,
)
from focusdpo_jax.data.manifest import LineError, PairLine

VISIBLE = 16
"""Smallest difference of a channel, in 1/255, that counts as visible; JPEG noise stays below."""

MISSED = 0.05
"""Largest share of the visibly different pixels that may be outside `prior_mask`."""

KEPT = 0.5
"""Smallest share of a subject's mask that must be inside the square window."""

MAGNIFIED = 4
"""Largest factor by which an image may be enlarged."""


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """Sides of the images of a data set, in pixels.

    Attributes:
      resolution: size of the chosen and rejected images and their masks.
      reference: size of the references.
    """

    resolution: int
    reference: int


def make_record(
    line: PairLine, contents: Mapping[str, bytes], sizes: ImageSizes
) -> tuple[dict, dict]:
    """Builds the record of a line.

    Args:
      line: the parsed line.
      contents: {field: content} of every file of `line.files()`.
      sizes: sizes of the result.

    Returns:
      The record, as in `record` but without `index`, with original_size int32 [2] (height, width)
      and crop int32 [2] (top, left), as SDXL's time ids expect them; and facts about it for the
      report.

    Raises:
      LineError: the message has the field, the fault and the cure.
    """
    images, masks, changes = decode_files(line.files(), contents)
    chosen, rejected = images["chosen"], images["rejected"]
    shape = height, width = chosen.shape[:2]
    _same_size("rejected", rejected, shape, "chosen")
    check_resolution(shape, sizes.resolution)
    check_masks(masks, images)
    difference = _difference(chosen, rejected)
    prior, subject_masks = _masks(line, masks, difference)

    view = geometry.window(height, width, sizes.resolution, _region(prior, subject_masks))
    record = {
        "caption": line.caption,
        "chosen": view.image(chosen),
        "rejected": view.image(rejected),
        "prior_mask": _crop_mask("prior_mask", prior, view),
        "original_size": np.array(shape, np.int32),
        "crop": np.array([view.top, view.left], np.int32),
        "subjects": [],
    }
    if np.array_equal(record["chosen"], record["rejected"]):
        raise LineError(
            "rejected",
            f"differs from chosen, but not at {sizes.resolution} x {sizes.resolution} pixels; give a "
            "larger difference or a higher resolution",
        )
    for i, (subject, mask) in enumerate(zip(line.subjects, subject_masks, strict=True)):
        where = f"subjects[{i}]."
        reference_mask = geometry.pad_to_square(masks[where + "reference_mask"], sizes.reference)
        if not reference_mask.any():
            raise LineError(where + "reference_mask", "is too small; mark the subject's pixels")
        mask = _crop_mask(where + "mask", mask, view)
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


def decode_files(
    files: Mapping[str, str], contents: Mapping[str, bytes]
) -> tuple[dict[str, RGBImage], dict[str, Mask], list[str]]:
    """Decodes the images and masks of a line.

    Args:
      files: {field: path}, as `PairLine.files()`; the fields of masks end in "mask".
      contents: {field: content}.

    Returns:
      {field: uint8 [H, W, 3]}, {field: bool [H, W]}, and the names of the conversions
      (`images.decode_image`).

    Raises:
      LineError: a file is not an image.
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


def check_masks(masks: Mapping[str, Mask], images: Mapping[str, RGBImage]) -> None:
    """Raises LineError if a mask is empty, or if its size differs from that of its image."""
    for field, mask in masks.items():
        image = field.removesuffix("_mask") if field.endswith("reference_mask") else "chosen"
        _same_size(field, mask, images[image].shape[:2], image)
        if not mask.any():
            raise LineError(field, "is empty; make the subject's pixels white")


def check_resolution(shape: tuple[int, int], resolution: int) -> None:
    """Raises LineError if a chosen image of (height, width) would be enlarged too much."""
    if min(shape) * MAGNIFIED < resolution:
        raise LineError(
            "chosen",
            f"is {_size(shape)} pixels, too small for {resolution}; give "
            f"at least {-(-resolution // MAGNIFIED)} on the shorter side",
        )


def _facts(line: PairLine, record: dict, contents: Mapping[str, bytes], changes: list[str]) -> dict:
    """Returns the JSON values of a line that the report aggregates."""
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


def _difference(chosen: RGBImage, rejected: RGBImage) -> Mask:
    """Returns bool [H, W], True where the two images differ visibly."""
    if np.array_equal(chosen, rejected):
        raise LineError("rejected", "equals chosen; a pair needs a difference to learn from")
    difference = np.abs(chosen.astype(np.int16) - rejected).max(-1) >= VISIBLE
    if not difference.any():
        raise LineError(
            "rejected",
            f"differs from chosen nowhere by {VISIBLE} of 255 or more; "
            "there is no visible reason for the rejection",
        )
    return difference


def _masks(line: PairLine, masks: Mapping[str, Mask], difference: Mask) -> tuple[Mask, list[Mask]]:
    """Returns M_prior and every subject's mask in the whole image; docs/data.md has fallbacks."""
    own = []
    for i, subject in enumerate(line.subjects):
        field = f"subjects[{i}].mask"
        mask = masks.get(field)
        if subject.box is not None:
            boxed = geometry.box_mask(subject.box, *difference.shape)
            inside = 1.0 if mask is None else (mask & boxed).sum() / mask.sum()
            if inside < KEPT:
                raise LineError(
                    f"subjects[{i}].box", f"holds {inside:.0%} of the mask; correct one of the two"
                )
            mask = boxed if mask is None else mask
        own.append(mask)
    prior, origin = masks.get("prior_mask"), "prior_mask"
    if prior is None and all(mask is not None for mask in own):
        prior, origin = np.any(own, axis=0), "the union of the subjects' masks"
    if prior is None:
        prior = _dilate(difference)
        return prior, [prior if mask is None else mask for mask in own]
    missed = (difference & ~_dilate(prior)).sum() / difference.sum()
    if missed > MISSED:
        raise LineError(
            "prior_mask",
            f"misses {missed:.0%} of where chosen and rejected differ "
            f"({origin}); mark all of it, or leave all masks in the target out",
        )
    return prior, [prior if mask is None else mask for mask in own]


def _region(prior: Mask, subject_masks: list[Mask]) -> Mask:
    """Returns the region on which the square window is centred."""
    return np.any([prior, *subject_masks], axis=0)


def _dilate(mask: Mask) -> Mask:
    """Dilates a mask by two pixels: blended images also differ on the seam."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


def _crop_mask(field: str, mask: Mask, view: geometry.Window) -> Mask:
    """Crops a mask to the window; raises LineError if too little of it remains."""
    left, top, right, bottom = np.rint(view.box).astype(int)
    kept = mask[top:bottom, left:right].sum() / mask.sum()
    if kept < KEPT:
        raise LineError(
            field,
            f"has only {kept:.0%} of its pixels inside the square that is kept of "
            "chosen; crop the images around the subjects yourself",
        )
    cropped = view.mask(mask)
    if not cropped.any():
        raise LineError(field, f"is too small: nothing of it is left at {view.size} pixels")
    return cropped


def _same_size(field: str, array: np.ndarray, shape: tuple[int, ...], other: str) -> None:
    if array.shape[:2] != shape:
        raise LineError(
            field,
            f"is {_size(array.shape)} pixels and {other} is {_size(shape)}; give both one size",
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
