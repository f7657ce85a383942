"""Searches meshes and batch sizes for a run, and plans the one that it recommends."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from focusdpo_jax import config as config_lib
from focusdpo_jax.config import RunConfig
from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import planner, targets


def search(
    config: RunConfig,
    topology: str,
    *,
    batches: Iterable[int],
    splits: list[dict[str, int]] | None = None,
    remats: Sequence[bool] = (False, True),
    report: Callable[[dict[str, Any] | Exception], None],
    **options: Any,
) -> list[dict[str, Any]]:
    """Searches meshes and batch sizes; returns all plans that were made, the recommended one first.

    Memory grows with the batch, and shrinks with more shards of the parameters or with remat. So
    for every batch size, starting with the smallest, meshes are tried from the most to the fewest
    shards until one does not fit. If the first mesh does not fit, larger batches are not tried. If
    nothing fits, the next lever is used: remat, then cached encodings (config.data.cache), then no
    gradient accumulation (config.accumulate = 1). The recommended plan has the most pairs per
    second; among equals, the fewest bytes of collectives per pair.

    Args:
      config: the `RunConfig`.
      topology: see `targets.devices`.
      batches: numbers of pairs per chip to try.
      splits: meshes to try; None for all products of data and fsdp.
      remats: values of config.model.remat to try, the faster first.
      report: called with every plan, or with a UserError or the compiler's error instead.
      **options: further arguments of `planner.plan`.

    Raises:
      UserError: nothing fits, or the memory or speed of the chip is unknown.
    """
    devices, chip = targets.devices(topology)
    count = len(devices)
    if not (chip.memory and chip.flops):
        raise UserError(
            f"--topology={topology}: memory and speed of {chip.name} are not both known, so plans "
            "cannot be compared; give the name of a TPU slice or a GPU"
        )
    splits = splits or [
        {"data": count // n, "fsdp": n, "tensor": 1} for n in range(1, count + 1) if count % n == 0
    ]
    splits = sorted(splits, key=lambda split: -split["fsdp"] * split["tensor"])
    plans: list[dict[str, Any]] = []

    def fits(split: dict[str, int], per_chip: int, levers: dict[str, Any]) -> bool:
        changes = levers | {f"mesh.{axis}": size for axis, size in split.items()}
        changes["batch_size"] = per_chip * count
        try:
            changed = config_lib.replace(config, changes)
            config_lib.check(changed)
            made = planner.plan(
                changed,
                topology,
                unless_held=True,
                cure=False,
                **options,
            )
        except (UserError, jax.errors.JaxRuntimeError) as error:
            # The compiler refuses programs that are far too large.
            report(error)
            return False
        made["changes"] = changes
        report(made)
        plans.append(made)
        return bool(made["fits"])

    for levers in _levers(config, remats):
        for per_chip in sorted(batches):
            fitting = list(
                itertools.takewhile(
                    lambda split, size=per_chip, levers=levers: fits(split, size, levers), splits
                )
            )
            if not fitting:
                break
        if any(made["fits"] for made in plans):
            break
    good = sorted(
        (made for made in plans if made["fits"]),
        key=lambda made: (-made["pairs_per_second"], _exchanged(made)),
    )
    if not good:
        raise UserError(
            f"--topology={topology}: nothing of what was tried fits; take more chips, a "
            "smaller config.resolution or config.trainable = 'lora'"
        )
    return good + [made for made in plans if not made["fits"]]


def plan_recommended(
    config: RunConfig, topology: str, changes: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Plans all programs of a run with the changes that `search` recommends.

    If a program does not fit, the fields that make it fit are added. "changes" in the result
    contains all changes.
    """
    made = planner.plan(config_lib.replace(config, changes), topology, **options)
    cured = [
        program["cure"]["changes"] for program in made["programs"].values() if program.get("cure")
    ]
    if cured:
        for more in cured:
            changes = {**changes, **more}
        made = planner.plan(config_lib.replace(config, changes), topology, **options)
    return made | {"changes": changes}


def _levers(config: RunConfig, remats: Iterable[bool]) -> list[dict[str, Any]]:
    """Returns the changes that `search` tries in turn, each including the previous ones."""
    levers: list[dict[str, Any]] = [{"model.remat": remat} for remat in remats]
    if not config.data.cache:
        levers.append(levers[-1] | {"data.cache": True})
    if config.accumulate > 1:
        levers.append(levers[-1] | {"accumulate": 1})
    return levers


def _exchanged(made: Mapping[str, Any]) -> float:
    """Returns the bytes of collectives per pair."""
    return (
        sum(kind["bytes"] for kinds in made["collectives"].values() for kind in kinds.values())
        / made["batch_size"]
    )
