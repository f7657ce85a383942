"""Prompts and reference images for sampling, parsed from the command line or from a file."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32
from PIL import Image, ImageOps

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.data.geometry import box_mask
from focusdpo_jax.data.images import read_image, read_mask_levels
from focusdpo_jax.errors import UserError

_KEYS = ("path", "phrase", "box", "mask", "scale")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_SCALE = re.compile(rf"(.*)\*({_NUMBER})$")
_BOX = re.compile(rf"{_NUMBER}(?:,{_NUMBER})*$")
_MASK = re.compile(r".*\.(png|jpe?g|webp|bmp|tiff?)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference image of a subject.

    Attributes:
      path: path of the image file.
      phrase: description of the subject ("a star"), for display only.
      box: x0, y0, x1, y1 in [0, 1], fractions of width and height: the region of the generated
        image that attends to this reference; None for the whole image.
      mask: file of a mask of that region instead of a box; "" for none.
      scale: weight of this reference, >= 0.

    Raises:
      UserError: a field is invalid, or both box and mask are given.
    """

    path: str
    phrase: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: str = ""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path or not isinstance(self.phrase, str):
            raise UserError(
                f"reference {self.path!r}: give the path of an image, and a text as its phrase."
            )
        if not isinstance(self.scale, (int, float)) or not 0 <= self.scale < float("inf"):
            raise UserError(f"reference {self.path}: scale = {self.scale!r}: give a number >= 0.")
        if self.box is None:
            return
        if self.mask:
            raise UserError(f"reference {self.path}: give a box or a mask, not both.")
        try:
            x0, y0, x1, y1 = self.box
            inside = 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise UserError(
                f"reference {self.path}: box = {self.box}: give x0,y0,x1,y1 with "
                "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, shares of width and height."
            )

    @property
    def has_region(self) -> bool:
        """Whether the reference is restricted to a region of the image."""
        return bool(self.box or self.mask)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One image to generate; its noise depends only on `seed`."""

    text: str
    references: tuple[Reference, ...]
    seed: int


def parse_reference(text: str) -> Reference:
    """Parses `a.png:a star@0,0,0.5,1*0.8`: path, phrase, region and scale.

    All parts but the path are optional. The region is a box or the file of a mask. The last colon
    separates path and phrase, so that `gs://bucket/a.png` is a path.

    Raises:
      UserError: the box or the scale is invalid.
    """
    path, colon, rest = text.rpartition(":")
    if not colon or rest.startswith("//"):
        path, rest = "", text
    scale = _SCALE.match(rest)
    if scale:
        rest = scale[1]
    head, _, region = rest.rpartition("@")
    # Without a phrase the rest is the path, whose name may contain an @.
    box, mask = head and _BOX.match(region), head and path and _MASK.match(region)
    if box or mask:
        rest = head
    values = {
        "scale": float(scale[2]) if scale else 1.0,
        "mask": region if mask else "",
        "box": tuple(map(float, region.split(","))) if box else None,
    }
    return Reference(path, rest.strip(), **values) if path else Reference(rest, **values)


def _read_reference(entry: Any) -> Reference:
    """Parses a reference in a prompt file: a text as on the command line, or an object."""
    if not isinstance(entry, dict):
        return parse_reference(entry)
    unknown = set(entry) - set(_KEYS)
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r} of a reference; known: {', '.join(_KEYS)}")
    box = entry.get("box")
    return Reference(**{**entry, "box": None if box is None else tuple(box)})


def read_prompts(
    path: epath.PathLike, default_references: Sequence[Reference] = (), seed: int = 0
) -> list[Prompt]:
    """Reads prompts from a file of JSON lines.

    Args:
      path: path of the file. Each line is an object with `prompt` and, optionally, `references` (a
        list of texts for `parse_reference`, or of objects with the fields of `Reference`; paths
        relative to the file) and `seed`.
      default_references: references of lines without references.
      seed: line i (from 0) without a seed has seed + i.

    Returns:
      A list of Prompt.

    Raises:
      UserError: the file or a line is invalid; the message has the line's number and the reason.
    """
    path = epath.Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path} cannot be read ({error}).") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            unknown = set(values) - {"prompt", "references", "seed"}
            if unknown:
                raise ValueError(f"unknown key {min(unknown)!r}")
            text, own_seed = values["prompt"], values.get("seed", seed + len(prompts))
            if not isinstance(text, str) or not isinstance(own_seed, int):
                raise ValueError("prompt must be a text and seed a whole number")
            references = [_read_reference(entry) for entry in values.get("references", ())]
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path}, line {number}: {reason}. A line is an object such as "
                '{"prompt": "a star on grass", "references": ["star.png:a star"]}.'
            ) from error
        references = [
            dataclasses.replace(
                r, path=str(path.parent / r.path), mask=str(path.parent / r.mask) if r.mask else ""
            )
            for r in references
        ]
        prompts.append(Prompt(text, tuple(references) or tuple(default_references), own_seed))
    if not prompts:
        raise UserError(f"--prompts={path} has no line.")
    return prompts


def load_reference(path: epath.PathLike, size: int) -> RGBImage:
    """Loads a reference for the image encoder, padded with white to uint8 [size, size, 3].

    The file is read by `data.images`, as in `prepare`.

    Raises:
      UserError: the file is missing or cannot be used.
    """
    image = Image.fromarray(read_image(path, "reference"))
    return np.asarray(ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white"))


def load_region_mask(reference: Reference, side: int) -> Float32[np.ndarray, "side side"]:
    """Returns a reference's region in a square image, float32 [side, side] in [0, 1].

    Raises:
      UserError: its mask is missing, cannot be used, or is black everywhere.
    """
    if not reference.mask:
        inside = box_mask(reference.box or (0, 0, 1, 1), side, side)
        return inside.astype(np.float32)
    levels = Image.fromarray(read_mask_levels(reference.mask, "mask"))
    mask = np.asarray(levels.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    if mask.max() < 0.5:
        raise UserError(
            f"mask {reference.mask} is dark everywhere; make the region of the subject white."
        )
    return mask
