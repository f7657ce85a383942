"""Renders Toybox subjects from signed distances and places them in images. NumPy only."""

import colorsys
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.toybox import silhouettes
from focusdpo_jax.toybox.nuisances import Canvas
from focusdpo_jax.toybox.subjects import CLASSES, PARTS, PATTERNS, Pose, Subject

_SATURATION, _VALUE = 0.85, 0.95
# Parts and outlines are neutral, so that the hues stay readable.
_WHITE, _INK = (250, 250, 250), (32, 30, 38)
_OUTLINE = 0.09  # Width of the outline, in radii.
_REACH = 1.5  # Largest distance of any part of a subject from its centre, in radii.


class Crop(NamedTuple):
    """A rendered subject.

    Colour planes come first in this module alone, where NumPy is faster on them.

    Attributes:
      color: float32 [3, N, M] in [0, 255].
      coverage: float32 [N, M] in [0, 1].
    """

    color: Float32[np.ndarray, "3 N M"]
    coverage: Float32[np.ndarray, "N M"]


@functools.lru_cache(4096)
def _rgb(hue: float) -> tuple[float, float, float]:
    red, green, blue = colorsys.hsv_to_rgb(hue, _SATURATION, _VALUE)
    return 255 * red, 255 * green, 255 * blue


def render_subject(subject: Subject, pose: Pose, pattern_scale: float = 1.0) -> Crop:
    """Renders one subject on a square crop whose size depends on the pose's radius alone.

    The crops of two individuals in one pose are therefore aligned. Edges are antialiased by distance:
    coverage falls from one to zero over one pixel.

    Args:
      subject: the individual.
      pose: its size, rotation and reflection.
      pattern_scale: magnification of the pattern.
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
    anchors = silhouettes.ANCHORS[name]
    body = silhouettes.BODIES[name](x, y)
    coverage = covered(body)
    fill = covered(body + _OUTLINE)  # Covered pixels that are not filled have the outline's colour.
    white = np.zeros_like(fill)
    if part == "eyes":
        whites = silhouettes.eyes(x, y, anchors["eyes"])
        rim = covered(whites - _OUTLINE)  # Separates the whites from light bodies.
        coverage = np.maximum(coverage, rim)
        fill = fill * (1 - rim)
        pupils = silhouettes.pupils(x, y, anchors["eyes"])
        white = np.maximum(covered(whites) - covered(pupils), 0)
    else:
        shape = covered(getattr(silhouettes, part)(x, y, anchors[part]))
        coverage = np.maximum(coverage, shape)
        if part == "hat":  # In front of the body; handle and legs are behind it.
            fill = fill * (1 - shape)

    pattern = silhouettes.PATTERNS[PATTERNS[subject.pattern]]
    share = np.zeros_like(fill)
    if pattern:
        scale = np.float32(pattern_scale)
        share = covered(scale * pattern(x / scale, y / scale))
    # Every pixel is a convex combination of four colours.
    palette = np.array([_rgb(subject.hue), _rgb(subject.pattern_hue), _WHITE, _INK], np.float32)
    light = fill * (1 - 0.05 * y)  # Shading: brighter towards the top.
    second = light * share
    shares = np.stack([light - second, second, white, 1 - fill - white])
    color = np.minimum(palette.T @ shares.reshape(4, -1), 255)
    return Crop(color.reshape(3, *fill.shape), coverage)


def trim(*crops: Crop) -> list[Crop]:
    """Trims crops of one pose to the smallest rectangle that contains the pixels covered by any of them."""
    touched = np.any([crop.coverage > 0 for crop in crops], axis=0)
    rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return [Crop(crop.color[:, *box], crop.coverage[box]) for crop in crops]


def _window(crop: Crop, offset: tuple[int, int]) -> tuple[slice, slice]:
    """Returns the slices of an image under a crop whose first pixel is at `offset` (row, column)."""
    height, width = crop.coverage.shape
    return slice(offset[0], offset[0] + height), slice(offset[1], offset[1] + width)


def paste(canvas: Canvas, crop: Crop, offset: tuple[int, int]) -> None:
    """Blends a crop into a canvas, float32 [3, R, R], in place."""
    view = canvas[:, *_window(crop, offset)]
    view += crop.coverage * (crop.color - view)


def covered_pixels(crop: Crop, offset: tuple[int, int], resolution: int) -> Mask:
    """Returns the pixels of an image that a crop covers at least partly, bool [resolution, resolution]."""
    mask = np.zeros((resolution, resolution), bool)
    mask[_window(crop, offset)] = crop.coverage > 0
    return mask


def to_uint8(canvas: Canvas) -> RGBImage:
    """Rounds a canvas to an image, uint8 [R, R, 3]."""
    return np.ascontiguousarray(np.rint(canvas).astype(np.uint8).transpose(1, 2, 0))


def bounding_box(mask: Mask) -> Float32[np.ndarray, "4"]:
    """Returns the bounds of a bool mask [H, W]: float32 (x0, y0, x1, y1) in [0, 1], x1 and y1 exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array(
        [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height],
        np.float32,
    )


def _random_offset(rng: np.random.Generator, crop: Crop, resolution: int) -> tuple[int, int]:
    """Draws a uniform offset at which a crop is inside the image."""
    height, width = crop.coverage.shape
    return int(rng.integers(resolution - height + 1)), int(rng.integers(resolution - width + 1))


def render_reference(
    rng: np.random.Generator, subject: Subject, resolution: int, pattern_scale: float = 1.0
) -> tuple[RGBImage, Mask]:
    """Renders a subject alone on white: image uint8 [R, R, 3] and mask bool [R, R]."""
    radius = rng.uniform(17, 21) * resolution / 64
    pose = Pose(radius, rng.uniform(-25, 25), bool(rng.integers(2)))
    (crop,) = trim(render_subject(subject, pose, pattern_scale))
    offset = _random_offset(rng, crop, resolution)
    canvas = np.full((3, resolution, resolution), 255, np.float32)
    paste(canvas, crop, offset)
    return to_uint8(canvas), covered_pixels(crop, offset, resolution)


def find_offsets(
    rng: np.random.Generator, groups: list[list[Crop]], resolution: int
) -> list[tuple[int, int]] | None:
    """Draws offsets at which crops of different groups neither overlap nor touch.

    Args:
      rng: random generator.
      groups: lists of crops of one size; the crops of a group share one offset.
      resolution: side of the image.

    Returns:
      An offset (row, column) a group, or None if 30 draws for a group find none.
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
        # The crop's own pixels and their four neighbours.
        for r, c in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
            free[row + r : row + r + height, column + c : column + c + width] &= ~touched
    return offsets
