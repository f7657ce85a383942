"""Colours of an image that brings an ICC profile, converted to sRGB.

Everything here and every published generator takes sRGB for granted. An image in Adobe RGB or
Display P3 looks dull without its profile, and the colours of a CMYK image are defined by its profile
alone. The conversion is Pillow's own, LittleCMS with its default, the perceptual intent.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

CONVERTED, IGNORED = "colour profile", "unusable colour profile"

# Colour space of a profile to the mode of the images that it describes.
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREYS = ("1", "L", "LA", "La", "I;16", "I;16B")
_UNUSABLE = (ImageCms.PyCMSError, OSError, ValueError, KeyError)
_SAME = 1  # Of 255: a profile that changes no colour by more than this counts as sRGB.


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts an image's colours by its profile.

    Args:
      image: without transparency, 8 bits a channel.
      profile: its ICC profile.

    Returns:
      The image, and `CONVERTED` or `IGNORED`, or nothing: an image in sRGB stays as it is, bit
      for bit. A profile that is damaged, or is of another colour space than the image, is
      ignored, as browsers do.
    """
    try:
        found = _conversion(image.mode, profile)
        if found is None:
            return image, ()
        mode, transform = found
        return ImageCms.applyTransform(image.convert(mode), transform), (CONVERTED,)
    except _UNUSABLE:
        return image, (IGNORED,)


def converts(mode: str, profile: bytes) -> bool:
    """Whether `to_srgb` would change the colours of an image of one of Pillow's modes."""
    try:
        return _conversion(mode, profile) is not None
    except _UNUSABLE:
        return False


def _conversion(mode, profile):
    """(mode to convert from, transform), or None where nothing is to be done."""
    if mode == "LAB":
        return None  # Says by itself what its colours are.
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
    # Grey with the profile of an RGB space is common; the other ways round mean nothing.
    if space == "GRAY" and mode not in _GREYS or (space == "CMYK") != (mode == "CMYK"):
        raise ValueError(f"a profile of {space} in an image of {mode}")
    transform = _transform(profile, _MODES[space])
    return None if transform is None else (_MODES[space], transform)


@functools.lru_cache(maxsize=8)
def _transform(profile, mode):
    """From images of the mode to sRGB; None where it would change nothing."""
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
