"""From an image of any shape to a square one: what is cut off, and where everything then lies.

A `Window` is a square part of an image. Images, masks and boxes go through one and the same, so
that they stay on top of each other to a fraction of a pixel.
"""

import dataclasses

import numpy as np
from PIL import Image

WHITE = 255


@dataclasses.dataclass(frozen=True)
class Window:
    """A square of an image, and the size at which it is kept.

    Attributes:
      height, width: of the whole image, in its pixels.
      size: side of the result, in pixels.
      top, left: where the square begins, counted in pixels of the *resized* image, whose
        shorter side is `size`: SDXL's crop coordinates.
    """

    height: int
    width: int
    size: int
    top: int
    left: int

    @property
    def scale(self) -> float:
        """Pixels of the image for one of the result, in both directions alike."""
        return min(self.height, self.width) / self.size

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, upper, right and lower bound in pixels of the whole image."""
        left, top = self.left * self.scale, self.top * self.scale
        side = min(self.height, self.width)
        # The last digits of a product may reach beyond the border.
        return left, top, min(left + side, self.width), min(top + side, self.height)

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """The window's part of uint8 [height, width, 3] as uint8 [size, size, 3]."""
        return _resize(pixels, (self.size, self.size), Image.Resampling.LANCZOS, self.box)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The same of bool [height, width]: a pixel belongs to it if at least half of it does."""
        return _resize_mask(mask, (self.size, self.size), self.box)


def window(height: int, width: int, size: int, region: np.ndarray) -> Window:
    """The largest square of an image that has `region` in its middle, as far as the border allows.

    Args:
      height, width: of the image.
      size: side of the result.
      region: bool [height, width], what matters; must not be empty.
    """
    side = min(height, width)
    room = np.floor((np.array([height, width]) - side) * size / side + 1e-9).astype(int)
    middle = np.array([(low + high) / 2 for low, high in bounds(region)])
    begin = np.rint((middle - side / 2) * size / side).astype(int)
    top, left = np.clip(begin, 0, room)
    return Window(height, width, size, int(top), int(left))


def square_around(region: np.ndarray, side: int) -> tuple[slice, slice]:
    """The square of an image that has `region` in its middle, as far as the border allows.

    Args:
      region: bool [H, W], not empty.
      side: in pixels, at most H and W.

    Returns:
      Its rows and columns.
    """
    slices = []
    for (low, high), length in zip(bounds(region), region.shape, strict=True):
        begin = min(max((low + high - side) // 2, 0), length - side)
        slices.append(slice(begin, begin + side))
    return tuple(slices)


def bounds(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) of a mask that is not empty; the ends are exclusive."""
    ranges = []
    for axis in (1, 0):
        where = np.flatnonzero(mask.any(axis))
        ranges.append((int(where[0]), int(where[-1]) + 1))
    return tuple(ranges)


def mask_box(mask: np.ndarray) -> np.ndarray:
    """float32 x0, y0, x1, y1 in [0, 1], the bounds of a mask that is not empty."""
    (top, bottom), (left, right) = bounds(mask)
    height, width = mask.shape
    return np.array([left / width, top / height, right / width, bottom / height], np.float32)


def box_mask(box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """bool [height, width], true in every pixel that the box (shares of the sides) touches."""
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    rows = slice(int(y0 * height), int(np.ceil(y1 * height)))
    mask[rows, int(x0 * width) : int(np.ceil(x1 * width))] = True
    return mask


def pad_to_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The whole image, scaled to fit and centred on white.

    Args:
      pixels: uint8 [H, W, 3], or a mask, bool [H, W], whose border is False.

    Returns:
      The same kind of array, [size, size(, 3)].
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


def _resize(pixels, size, filter_, box=None):
    """Pillow's resize, which averages over all that a pixel of the result covers."""
    whole = (0, 0, pixels.shape[1], pixels.shape[0])
    if size == pixels.shape[:2] and box in (None, whole):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], filter_, box))


def _resize_mask(mask, size, box=None):
    grey = mask.astype(np.uint8) * 255
    return _resize(grey, size, Image.Resampling.BILINEAR, box) >= 128
