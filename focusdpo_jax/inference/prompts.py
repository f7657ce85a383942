"""What a user asks for: a prompt and images of its subjects, from the command line or a file."""

import dataclasses
import json
import re

import numpy as np
from etils import epath
from PIL import Image, ImageOps

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
    """An image of a subject.

    Attributes:
      path: of the file.
      phrase: for people to read, what it shows ("a star").
      box: x0, y0, x1, y1 in [0, 1], shares of width and height: where in the image to draw the
        subject may show itself; None for everywhere.
      mask: file that says the same by its light pixels; "" for none. Not with a box.
      scale: weight of this reference, >= 0.
    """

    path: str
    phrase: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: str = ""
    scale: float = 1.0

    def __post_init__(self):
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
    def has_region(self):
        """Whether it may show itself in a part of the image alone."""
        return bool(self.box or self.mask)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One image to draw; `seed` alone decides its noise."""

    text: str
    references: tuple[Reference, ...]
    seed: int


def parse_reference(text):
    """`a.png:a star@0,0,0.5,1*0.8` as a Reference: path, phrase, place and scale.

    All but the path may be left out. The place is a box or the file of a mask. The last colon
    divides path and phrase, so that `gs://bucket/a.png` needs nothing special.

    Raises:
      UserError: a box is no box, or a scale is negative.
    """
    path, colon, rest = text.rpartition(":")
    if not colon or rest.startswith("//"):
        path, rest = "", text
    scale = _SCALE.match(rest)
    if scale:
        rest = scale[1]
    head, _, place = rest.rpartition("@")
    # Without a phrase the rest is the path, in which an @ may be part of a name.
    box, mask = head and _BOX.match(place), head and path and _MASK.match(place)
    if box or mask:
        rest = head
    values = {
        "scale": float(scale[2]) if scale else 1.0,
        "mask": place if mask else "",
        "box": tuple(map(float, place.split(","))) if box else None,
    }
    return Reference(path, rest.strip(), **values) if path else Reference(rest, **values)


def _read_reference(entry):
    """A reference in a line of a file: the text of the flag, or an object of its parts."""
    if not isinstance(entry, dict):
        return parse_reference(entry)
    unknown = set(entry) - set(_KEYS)
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r} of a reference; known: {', '.join(_KEYS)}")
    box = entry.get("box")
    return Reference(**{**entry, "box": None if box is None else tuple(box)})


def read_prompts(path, default_references=(), seed=0):
    """Prompts from a file of JSON lines.

    Args:
      path: each line an object with `prompt` and, if wanted, `references` (a list of texts as for
        `parse_reference`, or of objects with the fields of `Reference`; paths relative to the file)
        and `seed`.
      default_references: of lines that name none.
      seed: of the first line that gives none, the next such line has one more, and so on.

    Returns:
      A list of Prompt.

    Raises:
      UserError: names the line and what is wrong with it.
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


def load_reference(path, size):
    """A reference as the image encoder takes it: uint8 [size, size, 3].

    It is read by `data.images`, as `prepare` reads; white fills up to a square.

    Raises:
      UserError: the file is missing or cannot be used.
    """
    image = Image.fromarray(read_image(path, "reference"))
    return np.asarray(ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white"))


def load_region_mask(reference, side):
    """Where a reference may show itself in a square image: float32 [side, side] in [0, 1].

    Raises:
      UserError: its mask is missing, cannot be used, or is black all over.
    """
    if not reference.mask:
        inside = box_mask(reference.box or (0, 0, 1, 1), side, side)
        return inside.astype(np.float32)
    levels = Image.fromarray(read_mask_levels(reference.mask, "mask"))
    mask = np.asarray(levels.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    if mask.max() < 0.5:
        raise UserError(
            f"mask {reference.mask} is dark all over; its light pixels say where the "
            "subject may be."
        )
    return mask
