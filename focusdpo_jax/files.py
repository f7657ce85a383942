"""Writing files so that nobody ever finds half of one."""

from etils import epath


def replace_file(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file in one move: a reader, or a killed writer, never sees half of it.

    Args:
      path: of the file; its folder is made if missing.
      content: text is written as UTF-8.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
