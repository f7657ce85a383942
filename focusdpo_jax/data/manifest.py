"""Parses manifests of preference pairs: one JSON object per line (docs/data.md).

This module checks the text: which fields there are, their values, and the paths of files.
`line_record` checks the content of the files.
"""

import dataclasses
import difflib
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from etils import epath

from focusdpo_jax.errors import UserError

MAX_LINE = 1 << 20
"""Longest line in bytes; a file with longer lines is not a manifest."""

MAX_FILE = 256 << 20
"""Largest size of an image file in bytes."""

MAX_TOKENS = 77
"""Number of tokens that CLIP's text encoders read, start and end tokens included."""

_FIELDS = ("caption", "chosen", "rejected", "subjects", "prior_mask", "group", "info")
_SUBJECT_FIELDS = ("reference", "reference_mask", "phrase", "mask", "box", "info")
# Cures in error messages for empty texts.
CAPTION = "describe the image"
PHRASE = "name the subject, as in 'a dog'"
# Lower bound of CLIP's tokenization: contractions, words, digits, runs of other characters.
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


class LineError(Exception):
    """Raised for a line that cannot be used.

    Attributes:
      field: the part of the line, such as "subjects[0].mask"; empty for the whole line.
      reason: the fault and the cure.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field, self.reason = field, reason


@dataclasses.dataclass(frozen=True)
class PairSubject:
    """A subject of a line; `box` is (x0, y0, x1, y1) in fractions of width and height."""

    reference: str
    reference_mask: str
    phrase: str
    mask: str | None
    box: tuple[float, float, float, float] | None


@dataclasses.dataclass(frozen=True)
class PairLine:
    """A line with valid text; paths are relative to the manifest's folder."""

    caption: str
    chosen: str
    rejected: str
    subjects: tuple[PairSubject, ...]
    prior_mask: str | None
    group: str | None

    def files(self) -> dict[str, str]:
        """Returns {field: path} of every file that the line refers to."""
        named = {"chosen": self.chosen, "rejected": self.rejected}
        if self.prior_mask is not None:
            named["prior_mask"] = self.prior_mask
        for i, subject in enumerate(self.subjects):
            for field in ("reference", "reference_mask", "mask"):
                if getattr(subject, field) is not None:
                    named[f"subjects[{i}].{field}"] = getattr(subject, field)
        return named


def read_lines(path: epath.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, its bytes) of every line that is not blank.

    A line longer than MAX_LINE is truncated to MAX_LINE + 1 bytes, which `parse_line` rejects.

    Raises:
      UserError: the file cannot be read.
    """
    number = 0
    try:
        with epath.Path(path).open("rb") as file:
            while chunk := file.readline(MAX_LINE + 1):
                number += 1
                line = chunk
                while len(chunk) > MAX_LINE and not chunk.endswith(b"\n"):
                    chunk = file.readline(MAX_LINE + 1)
                if line.strip():
                    yield number, line
    except (OSError, ValueError) as error:
        raise UserError(
            f"--manifest={path} cannot be read ({_why(error)}); give a file of JSON lines"
        ) from error


def parse_line(text: bytes, *, max_subjects: int) -> PairLine:
    """Parses a line and checks every field on its own.

    Raises:
      LineError: the message has the field and the cure.
    """
    values = parse_object(text, _FIELDS)
    return PairLine(
        caption=read_text(values, "caption", CAPTION),
        chosen=read_path(values, "chosen"),
        rejected=read_path(values, "rejected"),
        subjects=tuple(
            _subject(s, f"subjects[{i}]") for i, s in enumerate(read_subjects(values, max_subjects))
        ),
        prior_mask=read_optional_path(values, "prior_mask"),
        group=read_group(values),
    )


def parse_object(text: bytes, fields: tuple[str, ...]) -> dict:
    """Parses the JSON object of a line, whose fields must be among `fields`.

    Raises:
      LineError: the line is not such an object.
    """
    if len(text) > MAX_LINE:
        raise LineError("", f"is longer than {MAX_LINE >> 20} MiB; every line is one JSON object")
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LineError(
            "", f"is not UTF-8 text (byte {error.start + 1}); save the manifest as UTF-8"
        ) from error
    try:
        values = json.loads(decoded, object_pairs_hook=_unique)
    except RecursionError as error:
        raise LineError("", "is nested too deeply; write one flat object") from error
    except ValueError as error:
        reason = (
            f"{error.msg} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise LineError("", f"is not JSON ({reason}); write one object per line") from error
    if not isinstance(values, dict):
        raise LineError("", "is not a JSON object; write {...}")
    check_known(values, fields, "")
    return values


def read_subjects(values: dict, max_subjects: int) -> list:
    """Returns the list of a line's subjects, whose entries are not checked yet."""
    subjects = values.get("subjects")
    if not isinstance(subjects, list):
        raise LineError(
            "subjects", f"{_given(values, 'subjects')}; give a list of 1 to {max_subjects} objects"
        )
    if not 1 <= len(subjects) <= max_subjects:
        raise LineError("subjects", f"has {len(subjects)} entries; give 1 to {max_subjects}")
    return subjects


def read_group(values: dict) -> str | None:
    """Returns the name of the group that a line belongs to, or None."""
    return read_text(values, "group", "give the name of a group") if "group" in values else None


def _subject(values: Any, where: str) -> PairSubject:
    check_subject(values, _SUBJECT_FIELDS, where)
    return PairSubject(
        reference=read_path(values, "reference", where + "."),
        reference_mask=read_path(values, "reference_mask", where + "."),
        phrase=read_text(values, "phrase", PHRASE, where + "."),
        mask=read_optional_path(values, "mask", where + "."),
        box=read_box(values, where + "."),
    )


def check_subject(values: Any, fields: tuple[str, ...], where: str) -> None:
    """Raises LineError if `values` is not a JSON object with fields among `fields`."""
    if not isinstance(values, dict):
        raise LineError(where, "is not a JSON object; write {...}")
    check_known(values, fields, where + ".")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise LineError(twice[:60], "is given twice; keep one")
    return values


def check_known(values: dict, fields: tuple[str, ...], where: str) -> None:
    """Raises LineError for a field that is not among `fields`; `where` is a prefix of its name."""
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            raise LineError(
                where + name[:60],
                "is not a field; "
                + (f"did you mean {close[0]}?" if close else "put your own data in info"),
            )


def _given(values: dict, name: str) -> str:
    return f"is {json.dumps(values[name])[:60]}" if name in values else "is missing"


def read_text(values: dict, name: str, cure: str, where: str = "") -> str:
    """Returns the text in a field, which must not be blank.

    Args:
      values: the JSON object.
      name: name of the field.
      cure: what the text should be, for the error message.
      where: prefix of the field's name in the error message.
    """
    text = values.get(name)
    if not isinstance(text, str):
        raise LineError(where + name, f"{_given(values, name)}; give a text")
    if not text.strip():
        raise LineError(where + name, f"is empty; {cure}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LineError(
            where + name, "has an unpaired surrogate, which is not a character; write it as UTF-8"
        ) from error
    return text


def read_path(values: dict, name: str, where: str = "") -> str:
    """Returns the path in a field, which must not be missing."""
    path = read_text(values, name, "give a file's path", where)
    if "\0" in path:
        raise LineError(where + name, "has a NUL character; give a file's path")
    return path


def read_optional_path(values: dict, name: str, where: str = "") -> str | None:
    """Returns the path in a field; None if it is missing."""
    return None if values.get(name) is None else read_path(values, name, where)


def read_box(values: dict, where: str) -> tuple[float, float, float, float] | None:
    """Returns the box of a subject, or None."""
    value, field = values.get("box"), where + "box"
    if value is None:
        return None
    form = "give [x0, y0, x1, y1] as shares of width and height, 0 <= x0 < x1 <= 1"
    numbers = (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    )
    if not numbers:
        raise LineError(field, f"is {json.dumps(value)[:60]}; {form}")
    x0, y0, x1, y1 = value
    if not (0 <= x0 <= 1 and 0 <= y0 <= 1 and 0 <= x1 <= 1 and 0 <= y1 <= 1):
        raise LineError(field, f"= {value} reaches outside the image; {form}, not pixels")
    if not (x0 < x1 and y0 < y1):
        raise LineError(field, f"= {value} is empty; {form}")
    return float(x0), float(y0), float(x1), float(y1)


def check_tokens(caption: str, tokens: int | None) -> None:
    """Raises LineError if CLIP would truncate a caption.

    Args:
      caption: the text.
      tokens: its number of CLIP tokens, start and end tokens included. None without a tokenizer:
        then only captions that are too long under any vocabulary are rejected.
    """
    at_least = "" if tokens is not None else "at least "
    tokens = len(_PIECES.findall(caption)) + 2 if tokens is None else tokens
    if tokens > MAX_TOKENS:
        raise LineError(
            "caption", f"has {at_least}{tokens} tokens and CLIP reads {MAX_TOKENS}; shorten it"
        )


def read_file(root: epath.PathLike, name: str, field: str) -> bytes:
    """Returns the content of the file `name` below the folder `root`.

    Raises:
      LineError: there is no such regular file, it is outside the folder, or it is too large.
    """
    root = os.fspath(root)
    parts = name.replace("\\", "/").split("/")
    outside = name.startswith(("/", "~")) or "://" in name or _climbs(parts)
    path = epath.Path(root) / name
    if not outside and "://" not in root:
        real = os.path.realpath(root)  # Links may lead anywhere.
        outside = not os.path.realpath(path).startswith(real.rstrip("/") + "/")
    if outside:
        raise LineError(
            field, f"= {name[:80]!r} is outside the manifest's folder; give a path below it"
        )
    try:
        if "://" not in root and not stat.S_ISREG(os.stat(path).st_mode):
            raise LineError(field, f"= {name[:80]!r} is not a regular file; give an image")
        if path.stat().length > MAX_FILE:
            raise LineError(
                field, f"= {name[:80]!r} is larger than {MAX_FILE >> 20} MiB; save it smaller"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LineError(field, f"= {name[:80]!r}: no such file in the manifest's folder") from error
    except (OSError, ValueError) as error:
        raise LineError(field, f"= {name[:80]!r} cannot be read ({_why(error)})") from error


def _climbs(parts: list[str]) -> bool:
    """Returns whether a path leaves its start folder at any point."""
    depth = 0
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return False


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
