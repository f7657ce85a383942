"""Conversion of images with an embedded ICC profile to sRGB.

All code here and all published generators assume sRGB. Without its profile an image in Adobe RGB or
Display P3 looks dull, and the colours of a CMYK image are undefined. Pillow's ImageCms (LittleCMS)
does the conversion with its default rendering intent, perceptual.
"""

import functools
import io
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

CONVERTED, IGNORED = "colour profile", "unusable colour profile"

# Maps a profile's colour space to the Pillow mode of the images that it describes.
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREYS = ("1", "L", "LA", "La", "I;16", "I;16B")
_UNUSABLE = (ImageCms.PyCMSError, OSError, ValueError, KeyError)
_SAME = 1  # In 1/255: a profile that changes no colour by more than this counts as sRGB.


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts an image to sRGB by its ICC profile.

    Args:
      image: 8 bits per channel, without transparency.
      profile: content of its ICC profile.

    Returns:
      The image, and a tuple with `CONVERTED`, with `IGNORED`, or empty. An image that is already in
      sRGB is returned unchanged, bit for bit. A profile that is damaged, or that belongs to another
      colour space than the image, is ignored, as in browsers.
    """
    try:
        conversion = _conversion(image.mode, profile)
        if conversion is None:
            return image, ()
        mode, transform = conversion
        converted = ImageCms.applyTransform(image.convert(mode), transform)
        assert converted is not None  # As of a conversion in place.
        return converted, (CONVERTED,)
    except _UNUSABLE:
        return image, (IGNORED,)


def converts(mode: str, profile: bytes) -> bool:
    """Returns whether `to_srgb` would change the colours of an image of this Pillow mode."""
    try:
        return _conversion(mode, profile) is not None
    except _UNUSABLE:
        return False


def _conversion(mode: str, profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """Returns (mode to convert from, transform), or None where no conversion is needed."""
    if mode == "LAB":
        return None  # LAB is device-independent and needs no profile.
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = cast(Any, opened.profile).xcolor_space
    # A grey image with the profile of an RGB space is common; other mismatches are invalid.
    if space == "GRAY" and mode not in _GREYS or (space == "CMYK") != (mode == "CMYK"):
        raise ValueError(f"a profile of {space} in an image of {mode}")
    transform = _transform(profile, _MODES[space])
    return None if transform is None else (_MODES[space], transform)


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform from images of this mode to sRGB, or None if it changes nothing."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
    )
    if mode == "CMYK":
        return transform
    levels = np.arange(256) if mode == "L" else np.arange(0, 256, 15)
    count = 1 if mode == "L" else 3
    samples = np.stack(np.meshgrid(*[levels] * count), -1).reshape(1, -1, count).astype(np.uint8)
    image = Image.fromarray(samples[..., 0] if mode == "L" else samples)
    converted = np.asarray(ImageCms.applyTransform(image, transform)).astype(int)
    return None if np.abs(converted - samples).max() <= _SAME else transform
