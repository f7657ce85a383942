"""Segmenters and captioners of other packages, found by their entry points.

A package that has one says so in its own setup.cfg:

    [options.entry_points]
    focusdpo_jax.segmenters =
        sam = my_package.masks:segment
    focusdpo_jax.captioners =
        blip = my_package.texts:describe

and `disrupt --segmenter=sam --captioner=blip` uses them. What they are called with, and what they
have to return, is `data.scene_manifest.Segmenter` and `data.scene_manifest.Captioner`.
"""

import importlib.metadata

from focusdpo_jax.errors import UserError

SEGMENTERS = "focusdpo_jax.segmenters"
CAPTIONERS = "focusdpo_jax.captioners"


def load(flag, group, name):
    """The function of an entry point; None for no name.

    Args:
      flag: where the name comes from, for messages.
      group: SEGMENTERS or CAPTIONERS.
      name: of the entry point.

    Raises:
      UserError: no installed package has it, it cannot be imported, or it is no function.
    """
    if not name:
        return None
    found = importlib.metadata.entry_points(group=group)
    if name not in found.names:
        listed = ", ".join(sorted(found.names)) or "none"
        raise UserError(
            f"--{flag}={name}: no installed package has such an entry point in the "
            f"group {group} (there: {listed}); install one, or see docs/data.md for "
            "how to write it"
        )
    entry = found[name]
    try:
        function = entry.load()
    except Exception as error:  # Whatever importing somebody's module raises.
        reason = " ".join(str(error).split())
        raise UserError(
            f"--{flag}={name}: {entry.value} cannot be loaded ({type(error).__name__}: {reason})"
        ) from error
    if not callable(function):
        raise UserError(
            f"--{flag}={name}: {entry.value} is {type(function).__name__} and not a function"
        )
    return function
