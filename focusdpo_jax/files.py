"""Writes files atomically, and reads JSON files with clear errors."""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator
from typing import IO

from etils import epath

from focusdpo_jax import file_kinds
from focusdpo_jax.errors import UserError

# Error numbers of a full disk, a quota and a limit of file sizes.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The same as texts: libraries in C++ raise errors of their own types with these messages.
_WORDS = tuple(os.strerror(number) for number in sorted(_FULL))


def read_json(path):
    """The dict of a JSON file.

    Args:
      path: an `epath.Path`.

    Raises:
      UserError: it is missing, or no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    try:
        values = json.loads(content.decode())
    except ValueError as error:
        what = file_kinds.describe(content[:512])
        raise UserError(f"{path} {what}." if what else f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is no JSON object.")
    return values


def replace_file(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file in one move: a reader, or a killed writer, never sees half of it.

    Args:
      path: of the file; its folder is made if missing.
      content: text is written as UTF-8.

    Raises:
      UserError: there is no room.
      OSError: it cannot be written for another reason.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A binary file to write, which appears under its name when the body has ended without an error.

    An error removes what was written. See `replace_file` for the arguments and errors.
    """
    path = epath.Path(path)
    # A name of its own, since processes that share a folder may write the same file at once.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def room_for(path: epath.PathLike) -> Iterator[None]:
    """Raises a UserError that names a file or folder in place of an error about missing disk space."""
    try:
        yield
    except Exception as error:
        reason = no_room(error)
        if reason is None or isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be written ({reason}); make room and run the same command again"
        ) from error


def no_room(error: BaseException) -> str | None:
    """The system's message, such as "No space left on device", of an error about disk space; else None."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return os.strerror(error.errno)
    text = str(error)
    return next((words for words in _WORDS if words in text), None)


def cannot_write(what: str, error: OSError) -> UserError:
    """The UserError of a folder that cannot be written.

    Args:
      what: the folder as the user gave it, such as "--output=OUT".
    """
    cure = "Make room" if no_room(error) else "Give a folder that you may write"
    return UserError(f"{what}: cannot write there ({error.strerror or error}). {cure}.")


def remove_unfinished(folder: epath.PathLike) -> None:
    """Removes what a killed `replace_file` has left in a folder and in those that lie in it."""
    for pattern in ("*.tmp", "*/*.tmp"):
        for path in epath.Path(folder).glob(pattern):
            if re.search(r"\.[0-9a-f]{8}\.tmp$", path.name):
                path.unlink(missing_ok=True)
