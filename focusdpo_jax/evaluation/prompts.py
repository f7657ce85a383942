"""What a user asks for: a prompt and pictures of its subjects, from the command line or a file."""

import dataclasses
import json

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from focusdpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reference:
    """A picture of a subject: its file and, for people to read, what it shows ("a star")."""

    path: str
    phrase: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One picture to draw; `seed` alone decides its noise."""

    text: str
    references: tuple[Reference, ...]
    seed: int


def parse_reference(text):
    """`a.png:a star` as a Reference; the phrase may be left out.

    The last colon divides, so that `gs://bucket/a.png` needs nothing special.
    """
    path, colon, phrase = text.rpartition(":")
    if not colon or phrase.startswith("//"):
        return Reference(text)
    return Reference(path, phrase.strip())


def read_prompts(path, default_references=(), seed=0):
    """Prompts from a file of JSON lines.

    Args:
      path: each line an object with `prompt` and, if wanted, `references` (a list of
        `path:phrase`, paths relative to the file) and `seed`.
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
            references = [parse_reference(entry) for entry in values.get("references", ())]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f'{path}, line {number}: {reason}. A line is an object such as '
                            '{"prompt": "a star on grass", "references": ["star.png:a star"]}.'
                            ) from error
        references = [dataclasses.replace(r, path=str(path.parent / r.path)) for r in references]
        prompts.append(Prompt(text, tuple(references) or tuple(default_references), own_seed))
    if not prompts:
        raise UserError(f"--prompts={path} has no line.")
    return prompts


def load_reference(path, size):
    """A reference as the image encoder takes it: uint8 [size, size, 3].

    The camera's rotation is applied, transparency becomes white, and white fills up to a square.

    Raises:
      UserError: the file is missing or is not a picture.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except FileNotFoundError as error:
        raise UserError(f"reference {path}: no such file.") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise UserError(f"reference {path} cannot be read as a picture ({error}).") from error
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    picture = ImageOps.pad(picture, (size, size), Image.Resampling.BICUBIC, color="white")
    return np.asarray(picture)
