"""The rules of a configuration: accepted values, and error messages."""

import json
import pathlib

import pytest
import tiny

from focusdpo_jax import config as config_lib
from focusdpo_jax.errors import UserError


def check(**overrides):
    """Validates the tiny configuration, whose data and model need not exist for it."""
    config_lib.check(tiny.tiny_config(pathlib.Path("nowhere"), **overrides))


@pytest.mark.parametrize(
    "name, argument",
    [
        ("toybox_dpo", None),
        *(
            ("toybox_base", stage)
            for stage in ("autoencoder", "image_encoder", "probe", "generator", "confusion")
        ),
        *(("sdxl_dpo", argument) for argument in ("", "lora", "full", "paper", "debug")),
    ],
)
def test_the_configurations_that_come_with_it_are_valid(name, argument):
    config_lib.parse(tiny.load_config(name, *([] if argument is None else [argument])))


@pytest.mark.parametrize("name", ["log_every", "checkpoint_every", "sample_every"])
def test_intervals_may_be_zero_and_beyond_the_end(name):
    for value in (0, 3, 10**9):
        check(**{name: value})
    with pytest.raises(UserError, match=f"config.{name} = -1: give a whole number >= 0"):
        check(**{name: -1})


@pytest.mark.parametrize("value", [(), (0.6, 1.0), (-1, 2)])
def test_timestep_logits_are_empty_or_two_numbers(value):
    check(objective="sft", timestep_logits=value)


@pytest.mark.parametrize(
    "value", [(1,), (0.6, 0.0), (0.6, -1.0), (0.6, 1.0, 2.0), (float("nan"), 1.0), ("0.6", 1.0)]
)
def test_other_timestep_logits_are_refused(value):
    with pytest.raises(UserError) as error:
        check(objective="sft", timestep_logits=value)
    assert str(error.value) == (
        f"config.timestep_logits = {value!r}: give () or a mean and a "
        "deviation > 0, such as (0.6, 1.0)"
    )


@pytest.mark.parametrize("objective", ["sft", "dpo", "focus_dpo", "patch_dpo"])
@pytest.mark.parametrize(
    "value, expected",
    [
        ((0.1,), (0.1, 0.1, 0.1)),
        ((0.05, 0.1, 0.2), (0.05, 0.1, 0.2)),
        ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0)),
    ],
)
def test_conditions_are_dropped_by_one_chance_or_three(objective, value, expected):
    check(objective=objective, condition_dropout=value)
    config = tiny.tiny_config(pathlib.Path("nowhere"), condition_dropout=value)
    assert config.dropout_chances == expected


@pytest.mark.parametrize("value", [(), (0.1, 0.1), (-0.1,), (0.34,), (0.5, 0.4, 0.2), ("0.1",)])
def test_other_chances_of_dropout_are_refused(value):
    with pytest.raises(UserError) as error:
        check(condition_dropout=value)
    assert str(error.value) == (
        f"config.condition_dropout = {value!r}: give the chance of losing the caption, the references and "
        "both, such as (0.05, 0.05, 0.05), or one number for each of them; their sum is at most 1"
    )


def test_a_run_with_one_number_for_dropout_resumes():
    config = tiny.tiny_config(pathlib.Path("nowhere"), condition_dropout=(0.1, 0.1, 0.1))
    new = json.loads(config_lib.to_json(config))
    assert config_lib.changed_fields(new | {"condition_dropout": 0.1}, new) == []
    assert config_lib.changed_fields(new | {"condition_dropout": 0.0}, new) == [
        "config.condition_dropout = [0.0, 0.0, 0.0] (now [0.1, 0.1, 0.1])"
    ]


@pytest.mark.parametrize("objective", ["dpo", "prior_dpo", "focus_dpo"])
def test_preference_objectives_take_no_timestep_logits(objective):
    check(objective=objective)
    with pytest.raises(
        UserError,
        match=r"config.timestep_logits = \(0.6, 1.0\): "
        rf"{objective} samples uniformly .*; give \(\)",
    ):
        check(objective=objective, timestep_logits=(0.6, 1.0))


def test_a_random_model_needs_its_sizes():
    with pytest.raises(
        UserError, match="config.model.pretrained = '': give a folder to start from"
    ):
        check(model__pretrained="", model__sizes=None)


def test_preference_objectives_refuse_a_share_of_rejected_images():
    check(objective="sft", rejected_share=0.5)
    with pytest.raises(
        UserError,
        match=r"config.rejected_share = 0.5: focus_dpo learns from both "
        r"images of a pair; give 0",
    ):
        check(objective="focus_dpo", rejected_share=0.5)


def test_a_run_without_a_newer_field_resumes():
    config = tiny.tiny_config(pathlib.Path("nowhere"))
    new = config_lib.to_dict(config)
    old = config_lib.to_dict(config)
    del old["dtype"], old["rejected_share"], old["model"]["remat"], old["data"]["source"]
    assert config_lib.changed_fields(old, new) == []
    new["dtype"] = "bfloat16"
    assert config_lib.changed_fields(old, new) == ["config.dtype = 'float32' (now 'bfloat16')"]
    assert config_lib.parse_saved(old) == config
    # One prototype stood for a subject, so that another default is another run.
    new["dtype"] = "float32"
    del old["focus"]["features"], old["focus"]["prototypes"]
    assert config_lib.changed_fields(old, new) == [
        f"config.focus.prototypes = 1 (now {new['focus']['prototypes']})"
    ]


def test_encoders_are_trained_in_float32():
    with pytest.raises(UserError, match="config.dtype = 'bfloat16': config.objective = 'autoenc"):
        check(objective="autoencode", dtype="bfloat16")


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"batch_size": 16},
            "config.data.train_size = 12: a step takes config.batch_size = 16 pairs; give at "
            "least 16, or config.batch_size = 12 at most",
        ),
        (
            {"batch_size": 4, "accumulate": 5},
            "config.data.train_size = 12: a step takes config.batch_size = 4 "
            "times config.accumulate = 5 pairs; give at least 20, or config.batch_size = 2 at most",
        ),
        ({"batch_size": 16, "mesh__data": 8}, "give at least 16, or config.batch_size = 8 at most"),
        (
            {"batch_size": 4, "accumulate": 20, "mesh__data": 4},
            "give at least 80, or config.batch_size = 4 and config.accumulate = 3 at most",
        ),
        (
            {"batch_size": 16, "mesh__data": 16},
            "or fewer devices than 16 in config.mesh.data and config.mesh.fsdp",
        ),
    ],
)
def test_a_batch_larger_than_the_data_set(changes, reason, tmp_path):
    config = tiny.tiny_config(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        config_lib.check(config)
    assert reason in str(error.value)


def test_the_largest_step_of_a_prepared_set(tmp_path):
    config = tiny.tiny_config(tmp_path, batch_size=8, accumulate=2)
    config_lib.require_pairs(config, "data", 16, 8)
    with pytest.raises(
        UserError,
        match="^config.batch_size = 8: data has 15 pairs to train on, and a step "
        "takes config.batch_size = 8 times config.accumulate = 2 pairs; give "
        "config.batch_size = 4 at most, or prepare more pairs$",
    ):
        config_lib.require_pairs(config, "data", 15, 4)
