"""Finds configuration files by path, or by name among those that ship with the package."""

import difflib
import importlib.util
import os
import pathlib

from focusdpo_jax.errors import UserError


def folder() -> pathlib.Path:
    """Returns the folder of the package's configurations: `configs/` of a checkout or the wheel."""
    package = pathlib.Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Returns the names of the package's configurations."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem != "__init__")


def find(name: str) -> str:
    """Returns the path of a configuration file.

    Args:
      name: a path, or the name of one of the package's configurations: `toybox_dpo`,
        `toybox_dpo.py` and `configs/toybox_dpo.py` are the same, in any working directory. A file
        at that path comes first. `:argument` may follow either.

    Returns:
      An existing path, with the argument if there is one.

    Raises:
      UserError: there is neither.
    """
    path, colon, argument = str(name).partition(":")
    if os.path.isfile(path):
        return name
    parent, file = os.path.split(path)
    stem = file.removesuffix(".py")
    if parent in ("", "configs") and stem in names():
        return f"{folder() / stem}.py{colon}{argument}"
    close = difflib.get_close_matches(stem, names(), 1)
    raise UserError(
        f"--config={path}: there is no such file. "
        + (f"Did you mean {close[0]}? " if close else "")
        + f"Names that need no path: {', '.join(names())}"
    )


def load(name: str, *arguments):
    """Returns the ConfigDict of a configuration file.

    Args:
      name: see `find`; an argument may follow a colon.
      arguments: arguments of its `get_config`, instead of the one after the colon.

    Raises:
      UserError: there is no such file, or it is not a Python file.
    """
    path, colon, argument = find(name).partition(":")
    if colon and not arguments:
        arguments = (argument,)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: a configuration must be a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
