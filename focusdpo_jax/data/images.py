"""Files of pictures and masks to arrays, and back: whatever people bring, and nothing unsafe.

A picture becomes RGB of 8 bits as its owner sees it: turned as its EXIF data says, transparency
over white. Its size is looked at before its pixels are, so that a small file cannot become a huge
array.
"""

import io
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
"""Most pixels of a picture; 192 MB as RGB."""

# What cameras, editors and networks write. Pillow knows more, some of it by calling other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_PLAIN = ("RGB", "L", "1")
_PICTURE = (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP,
            cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)
_MASK = (cv2.IMWRITE_PNG_BILEVEL, 1)


class UnreadableImage(Exception):
    """Its message says what is wrong with a file, without naming the file."""


def decode_picture(content: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """The picture in a file's content.

    Returns:
      uint8 [H, W, 3], and what had to be changed to get there: any of "rotated", "alpha",
      "palette", "cmyk", "16 bit", "grey", "other mode".

    Raises:
      UnreadableImage: it is no picture, damaged, too large, or of several frames.
    """
    image, changes = _open(content)
    if _has_alpha(image):
        changes.append("alpha")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB")), tuple(changes)


def decode_mask(content: bytes) -> np.ndarray:
    """The mask in a file's content: where it is lighter than middle grey.

    Where the file has transparent parts, transparency is the mask instead: a cut-out's is.

    Returns:
      bool [H, W].

    Raises:
      UnreadableImage: as in `decode_picture`; also where a mask is marked with small numbers.
    """
    image, _ = _open(content)
    if _has_alpha(image):
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 128:
            return alpha >= 128
        image = image.convert("RGB")
    grey = np.asarray(image.convert("L"))
    if 0 < grey.max() < 128:
        raise UnreadableImage(f"is no mask: its lightest value is {grey.max()}; white (128 to "
                              "255) marks the subject")
    return grey >= 128


def encode_png(image: np.ndarray) -> bytes:
    """A uint8 [H, W, 3] picture or a bool [H, W] mask as a PNG file's content, without loss.

    Written to be read often: a picture's rows as differences from the row above in runs of equal
    bytes, which is read in two thirds of the time of what PNG writers choose and takes no more
    room; a mask with one bit a pixel.
    """
    if image.dtype == bool:
        image, how = image.astype(np.uint8) * 255, _MASK
    else:
        image, how = image[..., ::-1], _PICTURE  # OpenCV's order of channels is BGR.
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1, *how])[1].tobytes()


def decode_png(content: bytes) -> np.ndarray:
    """What `encode_png` was given: uint8 [H, W, 3], or bool [H, W].

    Raises:
      UnreadableImage: it is no PNG, or damaged.
    """
    # The header's colour type is 2 for RGB and 0 for the greys of a mask.
    mask = content[25:26] == b"\0"
    image = cv2.imdecode(np.frombuffer(content, np.uint8),
                         cv2.IMREAD_GRAYSCALE if mask else cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise UnreadableImage("is damaged; copy it again")
    return image > 0 if mask else image


def _open(content: bytes) -> tuple[Image.Image, list[str]]:
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
                if orientation in range(2, 9):
                    image = ImageOps.exif_transpose(image)
                    changes.append("rotated")
                else:
                    image = image.copy()  # Detached from the file.
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage("is far too large for a picture; scale it down") from error
    except MemoryError as error:
        raise UnreadableImage("does not fit into memory; scale it down") from error
    except Exception as error:  # Every format of Pillow's raises its own.
        raise UnreadableImage(_describe(content, error)) from error
    return _eight_bits(image, changes), changes


def _describe(content: bytes, error: Exception) -> str:
    if not content:
        return "is an empty file; copy it again"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no picture in PNG, JPEG, WebP, TIFF, BMP or GIF; convert it"
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
        raise UnreadableImage(f"is {height} x {width} pixels, more than {MAX_PIXELS // 10**6} "
                              "million; scale it down")


def _eight_bits(image: Image.Image, changes: list[str]) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or mode == "I" and image.format in (None, "PNG"):
        changes.append("16 bit")
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("has more than 16 bits a channel; save it with 8")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if mode in ("I", "F"):
        raise UnreadableImage("has 32 bits a channel; save it with 8")
    named = {"P": "palette", "PA": "palette", "CMYK": "cmyk", "L": "grey", "1": "grey",
             "LA": "grey"}
    if mode in named:
        changes.append(named[mode])
    elif mode not in ("RGB", "RGBA"):
        changes.append("other mode")
    return image


def _has_alpha(image: Image.Image) -> bool:
    return image.mode not in _PLAIN and image.has_transparency_data
