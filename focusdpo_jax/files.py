"""Writing files so that nobody ever finds half of one, and reading JSON that may be none."""

import json
import re
import uuid

from etils import epath

from focusdpo_jax import file_kinds
from focusdpo_jax.errors import UserError


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
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, since processes that share a folder may write the same file at once.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def remove_unfinished(folder: epath.PathLike) -> None:
    """Removes what a killed `replace_file` has left in a folder and in those that lie in it."""
    for pattern in ("*.tmp", "*/*.tmp"):
        for path in epath.Path(folder).glob(pattern):
            if re.search(r"\.[0-9a-f]{8}\.tmp$", path.name):
                path.unlink(missing_ok=True)
