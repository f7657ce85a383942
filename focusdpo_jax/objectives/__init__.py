"""Registry of training objectives: their requirements, weights and losses.

    from focusdpo_jax import objectives
    objectives.get("dpo").needs_reference        # True

    python -m focusdpo_jax.objectives            # prints the requirements of each objective

To add an objective, add a module that calls `register` to this package; all its modules are
imported. Code outside this package does not compare the names of objectives.
"""

import functools
import importlib
import pkgutil

from focusdpo_jax.errors import UserError
from focusdpo_jax.objectives.base import (
    EncoderObjective,
    FocusMaps,
    GeneratorObjective,
    ImageErrors,
    WeightInputs,
    register,
    registered,
)


@functools.cache
def _load():
    for module in pkgutil.iter_modules(__path__):
        if module.name != "__main__":
            importlib.import_module(f"{__name__}.{module.name}")


def get(name: str) -> GeneratorObjective | EncoderObjective:
    """Returns the objective of this name.

    Raises:
      UserError: there is none.
    """
    _load()
    if name not in registered:
        choices = ", ".join(map(repr, names()))
        raise UserError(f"config.objective = {name!r}: choose one of {choices}")
    return registered[name]


def get_generator(name: str) -> GeneratorObjective:
    """Returns the objective of this name, which must train a generator; see `get`."""
    objective = get(name)
    assert isinstance(objective, GeneratorObjective), name
    return objective


def names() -> tuple[str, ...]:
    """Returns the names of all objectives, those of generators first."""
    _load()
    return tuple(sorted(registered, key=lambda name: (not registered[name].trains_generator, name)))
