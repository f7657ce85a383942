"""The registry of objectives."""

import dataclasses
import pathlib
import re

import pytest
import tiny

from focusdpo_jax import objectives
from focusdpo_jax.errors import UserError
from focusdpo_jax.objectives import __main__ as listing
from focusdpo_jax.objectives.base import register


def test_what_objectives_need():
    needs = {row[0]: row[2:] for row in listing.rows()[1:]}
    assert needs["focus_dpo"] == ["yes", "yes", "yes", "-"]
    assert needs["dpo"] == needs["prior_dpo"] == ["yes", "yes", "-", "-"]
    assert needs["patch_dpo"] == ["yes", "-", "-", "yes"]
    assert needs["sft"] == needs["subject_sft"] == ["-"] * 4
    assert set(needs) == set(objectives.names())


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="config.objective = 'focus': choose one of .*'focus_dpo'"):
        objectives.get("focus")


def test_a_name_is_registered_once():
    other = dataclasses.replace(objectives.get("dpo"), title="another")
    with pytest.raises(ValueError, match="two objectives 'dpo'"):
        register(other)
    assert register(objectives.get("dpo")).title == "Diffusion-DPO"


def test_no_other_module_compares_the_name_of_an_objective():
    names = "|".join(objectives.names())
    compares = re.compile(rf"objective(\.name)?\s*(==|!=|in)\s*[(\[]?\"({names})\"")
    package = pathlib.Path(tiny.ROOT) / "focusdpo_jax"
    found = [
        f"{path}: {match[0]}"
        for path in package.rglob("*.py")
        if path.parent.name != "objectives"
        for match in compares.finditer(path.read_text())
    ]
    assert not found
