"""Crops, resizes and pads images of any shape to squares.

A `Window` is a square part of an image. Images, masks and boxes are cropped by the same window, so
that they stay aligned to a fraction of a pixel.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32
from PIL import Image

from focusdpo_jax.array_types import Mask, RGBImage

WHITE = 255


@dataclasses.dataclass(frozen=True)
class Window:
    """A square part of an image, and the resolution to which it is resized.

    Attributes:
      height, width: height and width of the whole image, in its pixels.
      size: side of the result, in pixels.
      top, left: offset of the square in pixels of the *resized* image, whose shorter side is
        `size`; these are SDXL's crop coordinates.
    """

    height: int
    width: int
    size: int
    top: int
    left: int

    @property
    def scale(self) -> float:
        """Pixels of the image per pixel of the result, the same in both directions."""
        return min(self.height, self.width) / self.size

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, upper, right and lower bound in pixels of the whole image."""
        left, top = self.left * self.scale, self.top * self.scale
        side = min(self.height, self.width)
        # The last digits of a product may reach beyond the border.
        return left, top, min(left + side, self.width), min(top + side, self.height)

    def image(self, pixels: RGBImage) -> RGBImage:
        """Crops and resizes uint8 [height, width, 3] to uint8 [size, size, 3]."""
        return _resize(pixels, (self.size, self.size), Image.Resampling.LANCZOS, self.box)

    def mask(self, mask: Mask) -> Mask:
        """Crops and resizes bool [height, width]; a pixel is True if at least half its area is."""
        return _resize_mask(mask, (self.size, self.size), self.box)


def window(height: int, width: int, size: int, region: Mask) -> Window:
    """Returns the largest square of an image, centred on `region` as far as the border allows.

    Args:
      height, width: height and width of the image.
      size: side of the result.
      region: bool [height, width], not empty.
    """
    side = min(height, width)
    room = np.floor((np.array([height, width]) - side) * size / side + 1e-9).astype(int)
    middle = np.array([(low + high) / 2 for low, high in bounds(region)])
    begin = np.rint((middle - side / 2) * size / side).astype(int)
    top, left = np.clip(begin, 0, room)
    return Window(height, width, size, int(top), int(left))


def square_around(region: Mask, side: int) -> tuple[slice, slice]:
    """Returns a square of an image, centred on `region` as far as the border allows.

    Args:
      region: bool [H, W], not empty.
      side: in pixels, at most H and W.

    Returns:
      Its slices of rows and columns.
    """
    slices = []
    for (low, high), length in zip(bounds(region), region.shape, strict=True):
        begin = min(max((low + high - side) // 2, 0), length - side)
        slices.append(slice(begin, begin + side))
    return tuple(slices)


def bounds(mask: Mask) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns ((top, bottom), (left, right)) of a non-empty mask; the ends are exclusive."""
    ranges = []
    for axis in (1, 0):
        where = np.flatnonzero(mask.any(axis))
        ranges.append((int(where[0]), int(where[-1]) + 1))
    return tuple(ranges)


def mask_box(mask: Mask) -> Float32[np.ndarray, "4"]:
    """Returns the bounding box of a mask that is not empty: float32 (x0, y0, x1, y1) in [0, 1]."""
    (top, bottom), (left, right) = bounds(mask)
    height, width = mask.shape
    return np.array([left / width, top / height, right / width, bottom / height], np.float32)


def box_mask(box: tuple[float, float, float, float], height: int, width: int) -> Mask:
    """Returns bool [height, width], True in every pixel that the box touches.

    Args:
      box: x0, y0, x1, y1 in [0, 1], fractions of width and height.
      height, width: height and width of the result.
    """
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    rows = slice(int(y0 * height), int(np.ceil(y1 * height)))
    mask[rows, int(x0 * width) : int(np.ceil(x1 * width))] = True
    return mask


def pad_to_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scales a whole image to fit a square and centres it on white.

    Args:
      pixels: uint8 [H, W, 3], or a mask, bool [H, W], whose padding is False.
      size: side of the result.

    Returns:
      An array of the same kind, [size, size] or [size, size, 3].
    """
    height, width = pixels.shape[:2]
    longer = max(height, width)
    inner = max(1, round(height * size / longer)), max(1, round(width * size / longer))
    if pixels.dtype == bool:
        result, small = np.zeros((size, size), bool), _resize_mask(pixels, inner)
    else:
        result = np.full((size, size, 3), WHITE, np.uint8)
        small = _resize(pixels, inner, Image.Resampling.BICUBIC)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    result[top : top + inner[0], left : left + inner[1]] = small
    return result


def _resize(
    pixels: np.ndarray,
    size: tuple[int, int],
    filter_: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resizes with Pillow, whose filters average over all pixels that a result pixel covers."""
    whole = (0, 0, pixels.shape[1], pixels.shape[0])
    if size == pixels.shape[:2] and box in (None, whole):
        return pixels
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), filter_, box))


def _resize_mask(
    mask: Mask, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Mask:
    grey = mask.astype(np.uint8) * 255
    return _resize(grey, size, Image.Resampling.BILINEAR, box) >= 128
