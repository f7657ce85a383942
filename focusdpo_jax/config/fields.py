"""Defines configuration fields: default, check, meaning, and whether resumed runs may change it."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on a value.

    Attributes:
      holds: value -> bool; a TypeError counts as False.
      cure: describes valid values; the end of the error message.
    """

    holds: Callable[[Any], bool]
    cure: str

    def __call__(self, value):
        """Returns whether the condition holds."""
        try:
            return bool(self.holds(value))
        except TypeError:
            return False


def setting(default, check, meaning, *, before=dataclasses.MISSING, may_change=False):
    """Returns a dataclass field.

    Args:
      default: default value; None for an optional field.
      check: a Check.
      meaning: one or two sentences, with units and the meaning of special values.
      before: value that corresponds to the behaviour before the field existed, if not the default.
      may_change: whether a resumed run may have another value. True for fields that affect how long
        to train and what to write, but not what is trained.
    """
    metadata = {"check": check, "meaning": meaning, "may_change": may_change}
    metadata["before"] = default if before is dataclasses.MISSING else before
    return dataclasses.field(default=default, metadata=metadata)


def one_of(*choices):
    """Requires one of some values."""
    return Check(lambda v: v in choices, "choose one of " + ", ".join(map(repr, choices)))


def number(low, high=float("inf"), *, above=False, below=False):
    """Requires a finite number from `low` to `high`, exclusive if `above` and `below`."""

    def holds(value):
        return (
            isinstance(value, numbers.Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (low < value if above else low <= value)
            and (value < high if below else value <= high)
        )

    bound = f"a number {'>' if above else '>='} {low}"
    other = f" and {'<' if below else '<='} {high}" if high < float("inf") else ""
    return Check(holds, "give " + bound + other)


def integer(low):
    """Requires an integer of at least `low`."""
    return Check(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low,
        f"give a whole number >= {low}",
    )


def devices():
    """Requires a number of devices, or -1."""
    return Check(
        lambda v: integer(-1)(v) and v != 0,
        "give a number of devices, or -1 for all that are left",
    )


def flag():
    """Requires True or False."""
    return Check(lambda v: isinstance(v, bool), "give True or False")


def text():
    """Requires a string."""
    return Check(lambda v: isinstance(v, str), "give a text")


def shares():
    """Requires probabilities that add up to 1."""
    return Check(
        lambda v: len(v) >= 1 and min(v) >= 0 and abs(sum(v) - 1) < 1e-6,
        "give probabilities that add up to 1",
    )


def radii():
    """Requires positive numbers."""
    return Check(
        lambda v: len(v) >= 1 and all(number(0, above=True)(radius) for radius in v),
        "give a number > 0 for each number of subjects",
    )


def dropout():
    """Requires one chance, or three whose sum is at most 1."""

    def holds(value):
        chances = value if isinstance(value, (tuple, list)) else (value,)
        return (
            len(chances) in (1, 3)
            and all(map(number(0, 1), chances))
            and sum(chances) * 3 / len(chances) <= 1 + 1e-9
        )

    return Check(
        holds,
        "give the chance of losing the caption, the references and both, such as "
        "(0.05, 0.05, 0.05), or one number for each of them; their sum is at most 1",
    )


def mean_and_deviation():
    """Requires (), or a mean and a positive deviation."""
    mean, deviation = number(-float("inf")), number(0, above=True)
    return Check(
        lambda v: (
            isinstance(v, (tuple, list))
            and (not v or len(v) == 2 and mean(v[0]) and deviation(v[1]))
        ),
        "give () or a mean and a deviation > 0, such as (0.6, 1.0)",
    )


def anything():
    """Accepts every value."""
    return Check(lambda v: True, "")
