"""Finds changes of configuration fields that make a program fit in memory, cheap ones first."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from focusdpo_jax.config import RunConfig
from focusdpo_jax.errors import UserError

# Optimistic guess of the share of the update's temporaries that remains with remat. It only decides
# which changes are compiled.
_REMAT = 0.2
# Largest number of compilations per cure.
_MOST = 3
# Share of a chip's memory that an extrapolation must leave free to be accepted without compilation.
_SPARE = 0.2
# {field of the configuration, with dots: value}.
Changes = dict[str, Any]


def candidates(config: RunConfig, name: str, chips: int) -> list[Changes]:
    """Returns changes that may make a program fit: first single ones, then combinations.

    Args:
      config: the `RunConfig`.
      name: name of the program, one of `programs.NAMES`.
      chips: number of chips.
    """
    shares = chips // max(config.mesh.tensor, 1)
    if name in ("sampling", "probe"):
        own = _fewer_rows("evaluation.batch_size", config.evaluation.batch_size, shares)
    elif name == "focus maps":
        own = _fewer_rows("evaluation.pictures", config.evaluation.pictures, shares)
    elif name == "encoding" and config.data.cache:
        own = _fewer_rows("evaluation.batch_size", config.evaluation.batch_size, shares)
    else:
        own = _of_a_step(config, name, shares)
    divided = [
        {"mesh.data": chips // (size * config.mesh.tensor), "mesh.fsdp": size}
        for size in range(2, shares + 1)
        if shares % size == 0 and size > max(config.mesh.fsdp, 1)
    ]
    last: list[Changes] = [{"accumulate": 1}] if config.accumulate > 1 else []
    if config.trainable != "lora":
        last.append({"trainable": "lora", "model.lora_rank": config.model.lora_rank or 32})
    alone = [*own, *divided, *last]
    # Combinations: the last option of each field, added one after the other.
    together: Changes = {}
    combined: list[Changes] = []
    for change in (*_furthest(own), *divided[-1:], *last):
        together = together | change
        combined.append(together)
    return [*alone, *(change for change in combined if change not in alone)]


def _fewer_rows(field: str, count: int, shares: int) -> list[Changes]:
    """Returns smaller values of a field; first a row per chip, if every chip computes all rows."""
    options = [{field: shares}] if shares > 1 and count % shares else []
    while count > 1:
        count //= 2
        options.append({field: count})
    return options


def _of_a_step(config: RunConfig, name: str, shares: int) -> list[Changes]:
    options: list[Changes] = []
    if name == "update" and not config.model.remat:
        options.append({"model.remat": True})
    if not config.data.cache:
        options.append({"data.cache": True})
    size, accumulate = config.batch_size, config.accumulate
    while size % (2 * shares) == 0:
        # Keeps the number of pairs per update of the parameters.
        size, accumulate = size // 2, accumulate * 2
        options.append({"batch_size": size, "accumulate": accumulate})
    return options


def _furthest(options: Iterable[Changes]) -> Iterable[Changes]:
    """Returns the last of the changes to the same fields, in the order of first occurrence."""
    return {tuple(change): change for change in options}.values()


def find(
    options: Iterable[Changes],
    made: Mapping[str, Any],
    limit: float,
    try_out: Callable[[Changes], tuple[float, int, Callable[[], float | None]]],
) -> dict[str, Any] | None:
    """Returns the first of some changes with which a program fits.

    The changed program is compiled, unless an extrapolation of its temporaries, proportional to the
    rows, leaves enough memory free.

    Args:
      options: changes to try, from `candidates`.
      made: entry of `planner.plan` for the program without changes.
      limit: memory of a chip in bytes.
      try_out: maps changes to (bytes held, rows per chip, function that compiles the program and
        returns its peak, or None if the compiler refuses it).

    Returns:
      {"changes": {field: value}, "peak": bytes, "compiled": bool}, or None.
    """
    compiled = 0
    for changes in options:
        try:
            held, rows, peak_of = try_out(changes)
        except UserError:  # An impossible mesh or batch size.
            continue
        temporaries = made["temporaries"]
        if temporaries is None:
            guess = held
        else:
            scale = rows / made["rows_per_chip"] * (_REMAT if changes.get("model.remat") else 1)
            guess = held + temporaries * scale
        if guess > limit:
            continue
        if (
            temporaries is not None
            and guess <= (1 - _SPARE) * limit
            and "model.remat" not in changes
        ):
            return {"changes": changes, "peak": guess, "compiled": False}
        peak, compiled = peak_of(), compiled + 1
        if (peak if peak is not None else math.inf) <= limit:
            return {"changes": changes, "peak": peak, "compiled": True}
        if compiled == _MOST:
            break
    return None


def in_words(name: str, made: Mapping[str, Any], limit: float) -> str:
    """Returns one sentence about a program that does not fit: its memory, and changes that help."""
    if made["peak"] is None:
        needs = f"it needs more than {(made['needs_at_least'] or made['held']) / 1e9:.1f} GB"
    else:
        needs = f"it needs {made['peak'] / 1e9:.1f} GB"
    needs += f" of the chip's {limit / 1e9:.1f} GB"
    cure = made.get("cure")
    if not cure:
        return (
            f"{name} does not fit: {needs}; nothing that was tried makes it fit: take more chips "
            "or a smaller config.resolution"
        )
    fields = ", ".join(f"config.{field} = {value!r}" for field, value in cure["changes"].items())
    peak = (
        f" ({'' if cure['compiled'] else 'about '}{cure['peak'] / 1e9:.1f} GB)"
        if cure["peak"]
        else ""
    )
    return f"{name} does not fit: {needs}; give {fields}{peak}"
