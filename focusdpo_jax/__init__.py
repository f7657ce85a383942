"""FocusDPO in JAX: preference post-training of personalised image generators.

    import focusdpo_jax as fd

    fd.focus.focus_map(...)        # the paper, for any trainer: requires only jax, numpy, jaxtyping
    fd.diffusion.sample(...)

Subpackages are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focusdpo_jax import diffusion, focus

__version__ = "0.1.0"

_PUBLIC = ("diffusion", "focus")


def __getattr__(name):
    if name in _PUBLIC:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
