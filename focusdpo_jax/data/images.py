"""Reads image and mask files into arrays, and writes PNG.

A decoded image is 8-bit sRGB as displayed by other programs: EXIF orientation applied, ICC profile
converted, transparency blended over white. The size is checked before pixels are decoded, so that a
small file cannot become a huge array. All commands read images and masks with this module.
"""

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.data import colours
from focusdpo_jax.errors import UserError

MAX_PIXELS = 64_000_000
"""Largest number of pixels of an image; 192 MB as RGB."""

# Common formats. Pillow supports more, some of them by running external programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_GREYS = ("1", "L", "LA", "La")
_RGB = (
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_UP,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
)
_MASK = (cv2.IMWRITE_PNG_BILEVEL, 1)


_Decoded = TypeVar("_Decoded")


class UnreadableImage(Exception):
    """Raised for files that cannot be decoded; the message omits the file's name."""


class _Opened(NamedTuple):
    """A decoded image with 8 bits per channel, EXIF orientation applied.

    Attributes:
      image: in any Pillow mode with 8 bits or fewer.
      profile: its ICC profile, or empty.
      changes: names of the conversions so far; see `decode_image`.
    """

    image: Image.Image
    profile: bytes
    changes: list[str]


def decode_image(content: bytes) -> tuple[RGBImage, tuple[str, ...]]:
    """Decodes the content of an image file.

    Returns:
      uint8 [H, W, 3], and the conversions that were needed: any of "rotated", "alpha", "palette",
      "cmyk", "16 bit", "grey", "other mode", `colours.CONVERTED`, `colours.IGNORED`.

    Raises:
      UnreadableImage: the content is not an image, or is damaged, too large, or has several frames.
    """
    image, profile, changes = _open(content)
    alpha = None
    if image.has_transparency_data:
        changes.append("alpha")
        grey, image = image.mode in _GREYS, image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if grey else "RGB")
    if profile:
        image, change = colours.to_srgb(image, profile)
        changes.extend(change)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(image), tuple(changes)


def decode_mask(content: bytes) -> Mask:
    """Decodes the content of a mask file: True where it is lighter than middle grey.

    If the file has transparent parts, its alpha channel is the mask instead, as in a cut-out.

    Returns:
      bool [H, W].

    Raises:
      UnreadableImage: as in `decode_image`; also if the mask's lightest value is above 0 and below
        128.
    """
    return decode_mask_levels(content) >= 128


def decode_mask_levels(content: bytes) -> UInt8[np.ndarray, "_ _"]:
    """Decodes a mask as `decode_mask` does, but returns its grey levels, uint8 [H, W]."""
    image = _open(content).image  # Colour profiles do not apply to masks.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() < 128:
            return alpha
        image = image.convert("RGB")
    grey = np.asarray(image.convert("L"))
    if 0 < grey.max() < 128:
        raise UnreadableImage(
            f"is not a mask: its lightest value is {grey.max()}; white (128 to 255) marks the "
            "subject"
        )
    return grey


def read_image(path: epath.PathLike, kind: str = "") -> RGBImage:
    """Reads an image file; logs a warning if its colour profile is unusable.

    Args:
      path: path of the file.
      kind: description of the file ("reference"), for error messages.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: the message has the file's path and the fault.
    """
    image, changes = _read(path, kind, decode_image)
    warn_of_profiles(path, changes)
    return image


def read_mask_levels(path: epath.PathLike, kind: str = "") -> UInt8[np.ndarray, "_ _"]:
    """Reads a mask file with `decode_mask_levels`; see `read_image` for arguments and errors."""
    return _read(path, kind, decode_mask_levels)


def warn_of_profiles(path: epath.PathLike, changes: tuple[str, ...]) -> None:
    """Logs a warning for a file whose colour profile could not be used."""
    if colours.IGNORED in changes:
        logging.warning(
            "%s: its ICC colour profile is damaged or of another kind of image; it is read as sRGB",
            path,
        )


def is_converted(content: bytes) -> bool:
    """Returns whether a file has a colour profile that changes its colours; False if unreadable.

    Earlier versions ignored profiles, so stored results for such files are outdated. No pixel is
    decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                profile = image.info.get("icc_profile")
                return bool(profile) and colours.converts(image.mode, profile)
    except Exception:  # `_open` reports the fault.
        return False


def _read(path: epath.PathLike, kind: str, decode: Callable[[bytes], _Decoded]) -> _Decoded:
    name = f"{kind} {path}".strip()
    try:
        return decode(epath.Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file.") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error}).") from error
    except UnreadableImage as error:
        raise UserError(f"{name} {error}.") from error


def encode_png(image: RGBImage | Mask) -> bytes:
    """Encodes uint8 [H, W, 3] or a bool [H, W] mask as the content of a PNG file, losslessly.

    The encoding favours reading speed. Rows of an image are stored as differences from the row
    above, run-length encoded: such files are decoded in two thirds of the time of those with
    default settings, and are no larger. A mask has one bit per pixel.
    """
    if image.dtype == bool:
        image, how = image.astype(np.uint8) * 255, _MASK
    else:
        image, how = image[..., ::-1], _RGB  # OpenCV's order of channels is BGR.
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1, *how])[1].tobytes()


def decode_png(content: bytes) -> RGBImage | Mask:
    """Decodes what `encode_png` returned: uint8 [H, W, 3], or bool [H, W].

    Raises:
      UnreadableImage: the content is not a PNG file, or is damaged.
    """
    # The header's colour type is 2 for RGB and 0 for the greys of a mask.
    mask = content[25:26] == b"\0"
    image = cv2.imdecode(
        np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE if mask else cv2.IMREAD_COLOR_RGB
    )
    if image is None:
        raise UnreadableImage("is damaged; copy it again")
    return image > 0 if mask else image


def _open(content: bytes) -> _Opened:
    """Decodes an image, converts 16 bits to 8, and applies the EXIF orientation."""
    changes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit is in `_check_size`.
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                _check_size(image)
                # An MPO file is a JPEG image followed by its own preview.
                if image.format != "MPO" and _has_second_frame(image):
                    raise UnreadableImage("has several frames; save one of them")
                orientation = image.getexif().get(0x0112, 1)
                image.load()
                profile = image.info.get("icc_profile") or b""
                if orientation in range(2, 9):
                    image = ImageOps.exif_transpose(image)
                    changes.append("rotated")
                else:
                    image = image.copy()  # Detached from the file.
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage("has far too many pixels; scale it down") from error
    except MemoryError as error:
        raise UnreadableImage("does not fit into memory; scale it down") from error
    except Exception as error:  # Each of Pillow's format plugins raises its own exceptions.
        raise UnreadableImage(_describe(content, error)) from error
    return _Opened(_eight_bits(image, changes), profile, changes)


def _describe(content: bytes, error: Exception) -> str:
    if not content:
        return "is an empty file; copy it again"
    if isinstance(error, Image.UnidentifiedImageError):
        if content[:4] in (b"II*\0", b"MM\0*"):
            return "is a TIFF of an unsupported kind, such as floats; save it with 8 bits"
        return "is not an image in PNG, JPEG, WebP, TIFF, BMP or GIF; convert it"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "is truncated; copy it again"
    reason = " ".join(str(error).split())[:80] or type(error).__name__
    return f"is damaged ({reason}); copy it again"


def _has_second_frame(image: Image.Image) -> bool:
    """Returns whether there is a second frame; does not count frames, which may be millions."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"is {height} x {width} pixels, more than {MAX_PIXELS // 10**6} million; scale it down"
        )


def _eight_bits(image: Image.Image, changes: list[str]) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        changes.append("16 bit")
        values = np.asarray(image).astype(np.int64)
        if 0 < values.max() < 256:
            raise UnreadableImage(
                f"has 16 bits per channel but no value above {values.max()} of "
                "65535, as if 8 were meant; save it with 8"
            )
        grey = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        if isinstance(image.info.get("transparency"), int):  # The one value that is transparent.
            shown = values != image.info["transparency"]
            grey.putalpha(Image.fromarray(shown.astype(np.uint8) * 255))
        return grey
    if mode in ("I", "F"):
        raise UnreadableImage("has 32 bits per channel; save it with 8")
    named = {
        "P": "palette",
        "PA": "palette",
        "CMYK": "cmyk",
        "L": "grey",
        "1": "grey",
        "LA": "grey",
    }
    if mode in named:
        changes.append(named[mode])
    elif mode not in ("RGB", "RGBA"):
        changes.append("other mode")
    return image
