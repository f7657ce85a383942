"""Files of images and masks to arrays, and back: whatever people bring, and nothing unsafe.

An image becomes sRGB of 8 bits as its owner sees it: turned as its EXIF data says, converted by its
ICC profile, transparency over white. Its size is checked before its pixels are decoded, so that a
small file cannot become a huge array. Every command reads images and masks by this module alone.
"""

import io
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from absl import logging
from etils import epath
from PIL import Image, ImageOps

from focusdpo_jax.data import colours
from focusdpo_jax.errors import UserError

MAX_PIXELS = 64_000_000
"""Most pixels of an image; 192 MB as RGB."""

# What cameras, editors and networks write. Pillow knows more, some of it by calling other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_GREYS = ("1", "L", "LA", "La")
_RGB = (
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_UP,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
)
_MASK = (cv2.IMWRITE_PNG_BILEVEL, 1)


class UnreadableImage(Exception):
    """Its message describes what is wrong with a file, without naming the file."""


class _Opened(NamedTuple):
    """A decoded and turned image of 8 bits a channel.

    Attributes:
      image: of any of Pillow's modes with 8 bits or fewer.
      profile: its ICC profile, empty where there is none.
      changes: what was changed so far.
    """

    image: Image.Image
    profile: bytes
    changes: list[str]


def decode_image(content: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """The image in a file's content.

    Returns:
      uint8 [H, W, 3], and what had to be changed to get there: any of "rotated", "alpha",
      "palette", "cmyk", "16 bit", "grey", "other mode", `colours.CONVERTED`, `colours.IGNORED`.

    Raises:
      UnreadableImage: it is no image, damaged, too large, or of several frames.
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


def decode_mask(content: bytes) -> np.ndarray:
    """The mask in a file's content: where it is lighter than middle grey.

    Where the file has transparent parts, transparency is the mask instead: a cut-out's is.

    Returns:
      bool [H, W].

    Raises:
      UnreadableImage: as in `decode_image`; also where a mask is marked with small numbers.
    """
    return decode_mask_levels(content) >= 128


def decode_mask_levels(content: bytes) -> np.ndarray:
    """As `decode_mask`, but how light the mask is: uint8 [H, W]."""
    image = _open(content).image  # A mask is no colour: profiles do not change it.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() < 128:
            return alpha
        image = image.convert("RGB")
    grey = np.asarray(image.convert("L"))
    if 0 < grey.max() < 128:
        raise UnreadableImage(
            f"is no mask: its lightest value is {grey.max()}; white (128 to 255) marks the subject"
        )
    return grey


def read_image(path: epath.PathLike, kind: str = "") -> np.ndarray:
    """The image in a file, uint8 [H, W, 3]; logs where its colour profile is damaged.

    Args:
      path: of the file.
      kind: what it is, for messages ("reference").

    Raises:
      UserError: names the file and what is wrong with it.
    """
    image, changes = _read(path, kind, decode_image)
    warn_of_profiles(path, changes)
    return image


def read_mask_levels(path: epath.PathLike, kind: str = "") -> np.ndarray:
    """The mask in a file by `decode_mask_levels`; see `read_image` for the rest."""
    return _read(path, kind, decode_mask_levels)


def warn_of_profiles(path: epath.PathLike, changes: tuple[str, ...]) -> None:
    """Logs a file whose colour profile could not be used."""
    if colours.IGNORED in changes:
        logging.warning(
            "%s: its ICC colour profile is damaged or of another kind of image; it is read as sRGB",
            path,
        )


def is_converted(content: bytes) -> bool:
    """Whether a file's content has a colour profile that changes its colours; False if unreadable.

    Such files were read without their profiles once: what was made of them then is no longer what
    would be made now. No pixel is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                profile = image.info.get("icc_profile")
                return bool(profile) and colours.converts(image.mode, profile)
    except Exception:  # As in `_open`, which says what is wrong.
        return False


def _read(path, kind, decode):
    name = f"{kind} {path}".strip()
    try:
        return decode(epath.Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file.") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error}).") from error
    except UnreadableImage as error:
        raise UserError(f"{name} {error}.") from error


def encode_png(image: np.ndarray) -> bytes:
    """A uint8 [H, W, 3] image or a bool [H, W] mask as a PNG file's content, without loss.

    Written to be read often: an image's rows as differences from the row above in runs of equal
    bytes, which is read in two thirds of the time of what PNG writers choose and takes no more
    room; a mask with one bit a pixel.
    """
    if image.dtype == bool:
        image, how = image.astype(np.uint8) * 255, _MASK
    else:
        image, how = image[..., ::-1], _RGB  # OpenCV's order of channels is BGR.
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1, *how])[1].tobytes()


def decode_png(content: bytes) -> np.ndarray:
    """What `encode_png` was given: uint8 [H, W, 3], or bool [H, W].

    Raises:
      UnreadableImage: it is no PNG, or damaged.
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
    """The decoded and turned image, with 16 bits brought to 8, and what was changed."""
    changes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit is in `_check_size`.
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                _check_size(image)
                # An MPO is a JPEG that brings its own preview.
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
        raise UnreadableImage("is far too large for an image; scale it down") from error
    except MemoryError as error:
        raise UnreadableImage("does not fit into memory; scale it down") from error
    except Exception as error:  # Every format of Pillow's raises its own.
        raise UnreadableImage(_describe(content, error)) from error
    return _Opened(_eight_bits(image, changes), profile, changes)


def _describe(content: bytes, error: Exception) -> str:
    if not content:
        return "is an empty file; copy it again"
    if isinstance(error, Image.UnidentifiedImageError):
        if content[:4] in (b"II*\0", b"MM\0*"):
            return "is a TIFF of a kind that is not read, such as floats; save it with 8 bits"
        return "is not an image in PNG, JPEG, WebP, TIFF, BMP or GIF; convert it"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "is truncated; copy it again"
    reason = " ".join(str(error).split())[:80] or type(error).__name__
    return f"is damaged ({reason}); copy it again"


def _has_second_frame(image: Image.Image) -> bool:
    """Without counting all of them, of which there may be millions."""
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
                f"has 16 bits a channel but no value above {values.max()} of "
                "65535, as if 8 were meant; save it with 8"
            )
        grey = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        if isinstance(image.info.get("transparency"), int):  # The one value that is transparent.
            shown = values != image.info["transparency"]
            grey.putalpha(Image.fromarray(shown.astype(np.uint8) * 255))
        return grey
    if mode in ("I", "F"):
        raise UnreadableImage("has 32 bits a channel; save it with 8")
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
