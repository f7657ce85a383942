"""Parses a run's configuration into typed, frozen sections, and checks it.

A command reads a ConfigDict from a file of `configs/` and passes it to `parse`. All other code
takes the resulting `RunConfig`. `sections` defines every field with its type, default, check and
meaning.
"""

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from focusdpo_jax.config.rules import check_together, require_pairs, smaller_step
from focusdpo_jax.config.sections import (
    DataConfig,
    EvaluationConfig,
    FocusConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
)
from focusdpo_jax.errors import UserError

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "FocusConfig",
    "MeshConfig",
    "ModelConfig",
    "RunConfig",
    "SamplingConfig",
    "changed_fields",
    "check",
    "defaults",
    "describe",
    "parse",
    "parse_saved",
    "replace",
    "require_pairs",
    "smaller_step",
    "to_dict",
    "to_json",
]


def _fields(section: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields (dotted name, field) of every field that is not a section."""
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


_FIELDS = dict(_fields())


def _flatten(values: Mapping, prefix="") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _FIELDS:
            yield from _flatten(value, name + ".")
        else:
            yield name, value


def _build(flat: Mapping[str, Any], section: Any = RunConfig, prefix: str = "") -> Any:
    """Returns a section with the values of `flat`, {dotted name: value}, and other defaults."""
    arguments = {}
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(flat, field.type, name + ".")
        elif name in flat:
            value = flat[name]
            listed = isinstance(value, list) and isinstance(field.default, tuple)
            arguments[field.name] = tuple(value) if listed else value
    return section(**arguments)


def _plain(config) -> dict:
    """Converts a ConfigDict or mapping to nested dicts."""
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def parse(config) -> RunConfig:
    """Returns the RunConfig of a ConfigDict or a nested mapping, after all checks.

    Missing fields get their defaults.

    Raises:
      UserError: a field is unknown or invalid; the message names it, its value and valid values.
    """
    flat = dict(_flatten(_plain(config)))
    for name in flat:
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, 1)
            raise UserError(
                f"config.{name} is not a field"
                + (f"; did you mean config.{close[0]}?" if close else "")
            )
    parsed = _build(flat)
    check(parsed)
    return parsed


def check(config: RunConfig) -> None:
    """Checks every field, then rules about several fields.

    Raises:
      UserError: see `parse`.
    """
    for name, value in _flatten(dataclasses.asdict(config)):
        condition = _FIELDS[name].metadata["check"]
        if not condition(value):
            raise UserError(f"config.{name} = {value!r}: {condition.cure}")
    check_together(config)


def parse_saved(values: Mapping) -> RunConfig:
    """Returns the RunConfig of a run's `config.json`, unchecked.

    Fields that did not exist when the run was started get the values that correspond to its
    behaviour.
    """
    before = {name: field.metadata["before"] for name, field in _FIELDS.items()}
    return _build(before | dict(_flatten(values)))


def replace(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Returns a copy with other values, {dotted name: value}, unchecked.

    Raises:
      KeyError: there is no such field.
    """
    for name in changes:
        if name not in _FIELDS:
            raise KeyError(name)
    return _build(dict(_flatten(dataclasses.asdict(config))) | dict(changes))


def defaults():
    """Returns a ConfigDict of all fields, which files of `configs/` modify."""
    import ml_collections  # Only commands need it.

    return ml_collections.ConfigDict(dataclasses.asdict(RunConfig()))


def to_dict(config: RunConfig) -> dict:
    """Returns nested dicts of all fields, without `model.sizes` if that is None."""
    values = dataclasses.asdict(config)
    if values["model"]["sizes"] is None:
        del values["model"]["sizes"]
    return values


def to_json(config: RunConfig) -> str:
    """Returns the text of `config.json`."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def changed_fields(old: Mapping, new: Mapping) -> list[str]:
    """Returns the changes that a resumed run must not have, such as "config.beta = 2.0 (now 3.0)".

    Args:
      old, new: contents of `config.json`.
    """
    old, new = (dict(_flatten(json.loads(to_json(parse_saved(values))))) for values in (old, new))
    for values in (old, new):  # Older runs have a single number.
        if not isinstance(chance := values["condition_dropout"], list):
            values["condition_dropout"] = [chance] * 3
    return [
        f"config.{name} = {old.get(name)!r} (now {new.get(name)!r})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _FIELDS[name].metadata["may_change"]
    ]


def describe(config: RunConfig) -> str:
    """Returns every field with its value and its meaning, as lines of text."""
    values, lines, section = dict(_flatten(dataclasses.asdict(config))), [], ""
    for name, field in _FIELDS.items():
        head = name.rpartition(".")[0]
        if head != section:
            section = head
            kind = next(f.type for f in dataclasses.fields(RunConfig) if f.name == head)
            lines += ["", f"# {kind.__doc__}"]
        lines.append(f"config.{name} = {values[name]!r}")
        lines += textwrap.wrap(
            field.metadata["meaning"], 96, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)
