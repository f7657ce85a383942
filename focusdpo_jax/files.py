"""Writes files atomically, and reads JSON files with clear errors."""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from focusdpo_jax import file_kinds
from focusdpo_jax.errors import UserError

# Error numbers of a full disk, an exceeded quota and an exceeded file size.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Their messages: libraries in C++ raise errors of other types that contain them.
_WORDS = tuple(os.strerror(number) for number in sorted(_FULL))


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file that contains an object.

    Raises:
      UserError: the file is missing, or not a JSON object.
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
        raise UserError(f"{path} is damaged: it is not a JSON object.")
    return values


def replace_file(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file atomically: it is never incomplete, even if the process is killed.

    Args:
      path: path of the file; its folder is created if missing.
      content: text is written as UTF-8.

    Raises:
      UserError: the disk is full.
      OSError: the file cannot be written for another reason.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields a binary file to write, which is renamed to `path` when the context ends.

    An exception in the context removes the file. See `replace_file` for the arguments and errors.
    """
    path = epath.Path(path)
    # A unique name, since several processes may write the same file in a shared folder.
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
    """Converts exceptions about a full disk in the context to a UserError that names `path`."""
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
    """Returns the system's message of an error about a full disk, or None for other errors.

    For example "No space left on device".
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return os.strerror(error.errno)
    text = str(error)
    return next((words for words in _WORDS if words in text), None)


def cannot_write(what: str, error: OSError) -> UserError:
    """Returns the UserError for a folder that cannot be written.

    Args:
      what: the option that names the folder, such as "--output=OUT".
      error: the exception.
    """
    cure = "Make room" if no_room(error) else "Give a folder that you may write"
    return UserError(f"{what}: cannot write there ({error.strerror or error}). {cure}.")


def remove_unfinished(folder: epath.PathLike) -> None:
    """Removes temporary files of killed `new_file`s in a folder and its direct subfolders."""
    for pattern in ("*.tmp", "*/*.tmp"):
        for path in epath.Path(folder).glob(pattern):
            if re.search(r"\.[0-9a-f]{8}\.tmp$", path.name):
                path.unlink(missing_ok=True)
