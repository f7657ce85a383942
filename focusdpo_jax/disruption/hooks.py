"""Loads segmenters and captioners of other packages by their entry points.

A package declares them in its setup.cfg:

    [options.entry_points]
    focusdpo_jax.segmenters =
        sam = my_package.masks:segment
    focusdpo_jax.captioners =
        blip = my_package.texts:describe

and `disrupt --segmenter=sam --captioner=blip` uses them. Their arguments and results are documented
at `data.scene_manifest.Segmenter` and `data.scene_manifest.Captioner`.
"""

import importlib.metadata
from collections.abc import Callable

from focusdpo_jax.errors import UserError

SEGMENTERS = "focusdpo_jax.segmenters"
CAPTIONERS = "focusdpo_jax.captioners"


def load(flag: str, group: str, name: str | None) -> Callable | None:
    """Loads the function of an entry point; returns None for an empty name.

    Args:
      flag: the command's flag, for error messages.
      group: SEGMENTERS or CAPTIONERS.
      name: name of the entry point.

    Raises:
      UserError: no installed package has it, it cannot be imported, or it is not a function.
    """
    if not name:
        return None
    entries = importlib.metadata.entry_points(group=group)
    if name not in entries.names:
        listed = ", ".join(sorted(entries.names)) or "none"
        raise UserError(
            f"--{flag}={name}: no installed package has such an entry point in the "
            f"group {group} (there: {listed}); install one, or see docs/data.md for "
            "how to write it"
        )
    entry = entries[name]
    try:
        function = entry.load()
    except Exception as error:  # Importing a third-party module can raise anything.
        reason = " ".join(str(error).split())
        raise UserError(
            f"--{flag}={name}: {entry.value} cannot be loaded ({type(error).__name__}: {reason})"
        ) from error
    if not callable(function):
        raise UserError(
            f"--{flag}={name}: {entry.value} is {type(function).__name__} and not a function"
        )
    return function
