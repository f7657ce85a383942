"""Writing files so that nobody ever finds half of one."""

import uuid

from etils import epath


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
