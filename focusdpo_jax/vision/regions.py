"""Where in an image its subjects stand: given as masks or boxes, or found by patch features."""

import dataclasses

import cv2
import numpy as np
from PIL import Image

from focusdpo_jax.data import dreambench, geometry, images

_MARGIN = 0.05  # Around a box, as a share of its longer side.
_SMALLEST = 0.01  # Share of the image's patches that a subject covers at least.


@dataclasses.dataclass(frozen=True)
class Region:
    """A subject's region in an image.

    Attributes:
      box: x0, y0, x1, y1 in [0, 1].
      mask: bool [H, W] of the image's size, its pixels, or None where only a box is known.
    """

    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None

    @classmethod
    def from_mask(cls, mask):
        """The region of a mask that is not empty."""
        return cls(tuple(map(float, geometry.mask_box(mask))), mask)


def crop_subject(image, region):
    """The subject alone: the square around its box, on white where the mask leaves it out.

    Args:
      image: uint8 [H, W, 3].
      region: a `Region`, or None for the whole image.

    Returns:
      uint8 [s, s, 3]; white where the square reaches beyond the image.
    """
    if place is None:
        return geometry.pad_to_square(image, max(image.shape[:2]))
    height, width = image.shape[:2]
    if region.mask is not None:
        image = np.where(region.mask[..., None], image, np.uint8(geometry.WHITE))
    x0, y0, x1, y1 = np.array(region.box) * (width, height, width, height)
    side = max(2, round(max(x1 - x0, y1 - y0) * (1 + 2 * _MARGIN)))
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    square = np.full((side, side, 3), geometry.WHITE, np.uint8)
    rows = slice(max(top, 0), max(min(top + side, height), 0))
    columns = slice(max(left, 0), max(min(left + side, width), 0))
    part = image[rows, columns]
    y, x = rows.start - top, columns.start - left
    square[y : y + part.shape[0], x : x + part.shape[1]] = part
    return square


def read_mask(path, size):
    """The mask in a file as bool of `size` (height, width), or None where it is empty.

    Raises:
      UserError: it cannot be read.
    """
    mask = images.read_mask_levels(path) >= 128
    if mask.shape != tuple(size):
        mask = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    return mask if mask.any() else None


def photograph_region(path, image):
    """The region of the subject of a photograph that has a NN_mask.png beside it, or None."""
    file = dreambench.mask_path(path)
    mask = read_mask(file, image.shape[:2]) if file.exists() else None
    return None if mask is None else Region.from_mask(mask)


def subject_prototype(features, mask):
    """What a subject's patches have in common: unit [D].

    Args:
      features: [g, g, D], unit vectors.
      mask: bool [H, W] of the subject in the same image, or None for all of it.
    """
    weight = np.ones(features.shape[:2], np.float32)
    if mask is not None:
        grid = cv2.resize(
            mask.astype(np.float32), features.shape[1::-1], interpolation=cv2.INTER_AREA
        )
        weight = grid if grid.any() else weight
    mean = np.einsum("yxd,yx->d", features, weight)
    return mean / np.linalg.norm(mean)


def find_regions(features, prototypes):
    """Where each of several subjects stands, [ours].

    A patch belongs to the subject whose prototype it resembles most, if it resembles it more than
    the background does (Otsu's threshold, 1979, over all patches). A subject's place is the largest
    connected piece of its patches, if that covers a hundredth of the image.

    A region found so is one that looks like the subject: leakage measured there is less than where
    the place is known. A subject of which nothing is found has no region.

    Args:
      features: [g, g, D], unit vectors of the image's patches.
      prototypes: [S, D], unit vectors.

    Returns:
      A list of S boxes (x0, y0, x1, y1 in [0, 1]), None where a subject is not found.
    """
    similarity = features @ np.asarray(prototypes).T
    best, strength = similarity.argmax(-1), similarity.max(-1)
    shown = strength > _otsu(strength)
    boxes = []
    for subject in range(len(prototypes)):
        pieces, labels, numbers, _ = cv2.connectedComponentsWithStats(
            ((best == subject) & shown).astype(np.uint8), connectivity=4
        )
        areas = numbers[1:, cv2.CC_STAT_AREA]
        if pieces < 2 or areas.max() < _SMALLEST * best.size:
            boxes.append(None)
            continue
        boxes.append(tuple(map(float, geometry.mask_box(labels == 1 + areas.argmax()))))
    return boxes


def _otsu(values):
    """The threshold that parts values into two groups with the least variance within them."""
    ordered = np.sort(values.ravel().astype(np.float64))
    count = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    means = below / count, (ordered.sum() - below) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (means[1] - means[0]) ** 2
    cut_at = between.argmax()
    return (ordered[cut_at] + ordered[cut_at + 1]) / 2
