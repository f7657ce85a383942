"""The rules of a run's configuration, checked in one place before anything is built or compiled.

A configuration is a ConfigDict made by a file of `configs/`. `RULES` lists every field there is;
what a field means stands beside it in those files.
"""

import difflib
import functools
import json
import numbers

import ml_collections

from focusdpo_jax.errors import UserError

SUPERVISED_OBJECTIVES = ("sft", "subject_sft")
# Those whose loss compares the policy with a reference model.
PREFERENCE_OBJECTIVES = ("dpo", "prior_dpo", "focus_dpo")
GENERATOR_OBJECTIVES = (*SUPERVISED_OBJECTIVES, "patch_dpo", *PREFERENCE_OBJECTIVES)
ENCODER_OBJECTIVES = ("autoencode", "attributes", "probe")

# Fields that may change between two runs in one folder: they say how long to train and how
# often to look, not what is trained.
_MAY_CHANGE = {
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "data.path",
    "data.cache",
    "data.workers",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}

# Fields that older runs' config.json lacks, with what those runs did.
_ADDED = {
    "dtype": "float32",
    "optimizer": "adamw",
    "anchor": 0.0,
    "anchor_fades": False,
    "rejected_share": 0.0,
    "model.remat": False,
    "model.scan_layers": True,
    "model.adapter": "",
    "model.image_encoder": "",
    "model.tokenizer": "",
    "model.lora_alpha": 0.0,
    "model.prediction_type": "",
    "data.source": "toybox",
    "data.workers": 0,
    "data.leak_probability": 0.5,
    "data.subject_radii": (14.0, 13.0, 11.5),
    "data.pattern_scale": 1.0,
    "data.same_class_probability": 0.0,
    "data.one_look_probability": 0.0,
    "data.nuisance_probability": 0.0,
    "data.prior_mask": "exact",
    "data.second_reference_probability": 0.0,
    "focus.features": "vit",
    "focus.prototypes": 1,
    "focus.own_subject": False,
    "focus.lambda_c": 0.0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "evaluation.validation_scenes": 0,
}


def _one_of(*choices):
    return (lambda v: v in choices), "choose one of " + ", ".join(map(repr, choices))


def _number(low, high=float("inf"), *, above=False):
    def check(value):
        return (
            isinstance(value, numbers.Real)
            and not isinstance(value, bool)
            and (low < value if above else low <= value)
            and value <= high
        )

    bound = f"a number {'>' if above else '>='} {low}"
    return check, "give " + bound + (f" and <= {high}" if high < float("inf") else "")


def _integer(low):
    return (
        (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low),
        f"give a whole number >= {low}",
    )


def _devices():
    check = _integer(-1)[0]
    return (lambda v: check(v) and v != 0), "give a number of devices, or -1 for all that are left"


def _flag():
    return (lambda v: isinstance(v, bool)), "give True or False"


def _text():
    return (lambda v: isinstance(v, str)), "give a text"


def _shares():
    return (
        (lambda v: len(v) >= 1 and min(v) >= 0 and abs(sum(v) - 1) < 1e-6),
        "give probabilities that add up to 1",
    )


def _radii():
    return (
        (lambda v: len(v) >= 1 and all(_number(0, above=True)[0](radius) for radius in v)),
        "give a number > 0 for each number of subjects",
    )


def _dropout():
    def check(value):
        chances = value if isinstance(value, (tuple, list)) else (value,)
        chance = _number(0, 1)[0]
        return (
            len(chances) in (1, 3)
            and all(map(chance, chances))
            and sum(chances) * 3 / len(chances) <= 1 + 1e-9
        )

    return check, (
        "give the chance of losing the caption, the references and both, such as "
        "(0.05, 0.05, 0.05), or one number for each of them; their sum is at most 1"
    )


def dropout_chances(config):
    """Chances of losing the caption alone, the references alone, and both (`condition_dropout`)."""
    value = config.condition_dropout
    chances = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return chances * (3 // len(chances))


def _mean_and_deviation():
    mean, deviation = _number(-float("inf"))[0], _number(0, above=True)[0]
    return (
        (
            lambda v: (
                isinstance(v, (tuple, list))
                and (not v or len(v) == 2 and mean(v[0]) and deviation(v[1]))
            )
        ),
        "give () or a mean and a deviation > 0, such as (0.6, 1.0)",
    )


def _anything():
    return (lambda v: True), ""


RULES = {
    "seed": _integer(0),
    "steps": _integer(1),
    "batch_size": _integer(1),
    "accumulate": _integer(1),
    "resolution": _integer(8),
    "dtype": _one_of("float32", "bfloat16"),
    "objective": _one_of(*GENERATOR_OBJECTIVES, *ENCODER_OBJECTIVES),
    "trainable": _one_of("adapter", "lora", "full", "generator"),
    "beta": _number(0, above=True),
    "anchor": _number(0),
    "anchor_fades": _flag(),
    "condition_dropout": _dropout(),
    "rejected_share": _number(0, 1),
    "timestep_logits": _mean_and_deviation(),
    "optimizer": _one_of("adamw", "muon"),
    "learning_rate": _number(0, above=True),
    "warmup_steps": _integer(0),
    "decay": _one_of("constant", "cosine", "wsd"),
    "weight_decay": _number(0),
    "adam_b2": _number(0, 1),
    "gradient_clip": _number(0, above=True),
    "ema_decay": _number(0, 1),
    "log_every": _integer(0),
    "checkpoint_every": _integer(0),
    "keep_checkpoints": _integer(1),
    "sample_every": _integer(0),
    "model.pretrained": _text(),
    "model.adapter": _text(),
    "model.image_encoder": _text(),
    "model.tokenizer": _text(),
    "model.prediction_type": _one_of("", "epsilon", "v_prediction", "v_prediction_zero_snr"),
    "model.lora_rank": _integer(0),
    "model.lora_alpha": _number(0),
    "model.remat": _flag(),
    "model.scan_layers": _flag(),
    "model.sizes": _anything(),
    "mesh.data": _devices(),
    "mesh.fsdp": _devices(),
    "mesh.tensor": _devices(),
    "data.source": _one_of("toybox", "prepared"),
    "data.path": _text(),
    "data.cache": _flag(),
    "data.workers": _integer(0),
    "data.seed": _integer(0),
    "data.train_size": _integer(1),
    "data.validation_size": _integer(1),
    "data.test_size": _integer(1),
    "data.subject_counts": _shares(),
    "data.leak_probability": _number(0, 1),
    "data.subject_radii": _radii(),
    "data.pattern_scale": _number(0, above=True),
    "data.same_class_probability": _number(0, 1),
    "data.one_look_probability": _number(0, 1),
    "data.nuisance_probability": _number(0, 1),
    "data.prior_mask": _one_of("exact", "dilated", "box"),
    "data.second_reference_probability": _number(0, 1),
    "focus.buckets": _integer(1),
    "focus.features": _one_of("vit", "unet", "attention"),
    "focus.prototypes": _integer(1),
    "focus.own_subject": _flag(),
    "focus.spaf": _flag(),
    "focus.dpce": _flag(),
    "focus.rho_noisy": _number(0),
    "focus.rho_clean": _number(0),
    "focus.lambda_s": _number(0),
    "focus.lambda_d": _number(0),
    "focus.lambda_c": _number(0),
    "focus.tau": _number(0, 1),
    "focus.gate_width": _number(0),
    "focus.background": _number(0),
    "focus.matched": _number(0, 1),
    "focus.detail_fraction": _number(0, 1),
    "focus.detail_bins": _integer(2),
    "focus.detail_sigma": _number(0, above=True),
    "sampling.steps": _integer(1),
    "sampling.guidance": _number(0),
    "evaluation.scenes": _integer(0),
    "evaluation.batch_size": _integer(1),
    "evaluation.pictures": _integer(0),
    "evaluation.validation_scenes": _integer(0),
}
_OPTIONAL = {"model.sizes"}


def validate(config):
    """Checks every field on its own, then the fields together.

    Raises:
      UserError: names the field, its value and what would be right.
    """
    fields = dict(_flatten(config.to_dict()))
    for name in fields:
        if name not in RULES:
            close = difflib.get_close_matches(name, RULES, 1)
            raise UserError(
                f"config.{name} is not a field"
                + (f"; did you mean config.{close[0]}?" if close else "")
            )
    for name, (check, cure) in RULES.items():
        if name not in fields:
            if name in _OPTIONAL:
                continue
            raise UserError(f"config.{name} is missing; {cure}")
        try:
            good = check(fields[name])
        except TypeError:
            good = False
        if not good:
            raise UserError(f"config.{name} = {fields[name]!r}: {cure}")
    _validate_together(config)


def _validate_together(config):
    if config.dtype != "float32" and config.objective in ENCODER_OBJECTIVES:
        raise UserError(
            f"config.dtype = {config.dtype!r}: config.objective = "
            f"{config.objective!r} trains an encoder; give 'float32'"
        )
    filled = [axis for axis in ("data", "fsdp", "tensor") if config.mesh[axis] == -1]
    if len(filled) > 1:
        raise UserError(
            f"config.mesh.{filled[1]} = -1: config.mesh.{filled[0]} = -1 takes the "
            "devices that are left already; give a number to one of them"
        )
    if (
        config.focus.features == "unet"
        and config.objective == "focus_dpo"
        and config.focus.spaf
        and not config.data.cache
    ):
        raise UserError(
            "config.data.cache = False: config.focus.features = 'unet' denoises every "
            "reference once in each bucket, which no step can afford; give True"
        )
    if config.objective not in (*SUPERVISED_OBJECTIVES, *ENCODER_OBJECTIVES):
        if config.rejected_share:
            raise UserError(
                f"config.rejected_share = {config.rejected_share}: "
                f"{config.objective} learns from both images of a pair; give 0"
            )
        if config.timestep_logits:
            raise UserError(
                f"config.timestep_logits = {config.timestep_logits}: "
                f"{config.objective} draws uniformly within its buckets; give ()"
            )
        if config.trainable == "generator":
            raise UserError(
                "config.trainable = 'generator': text encoders are trained with "
                "config.objective = 'sft' or 'subject_sft'; choose adapter, lora or "
                "full"
            )
    if config.trainable == "lora" and not config.model.lora_rank:
        raise UserError(
            "config.model.lora_rank = 0: config.trainable = 'lora' needs a rank, for example 8"
        )
    if not config.model.pretrained and "sizes" not in config.model:
        raise UserError(
            "config.model.pretrained = '': give a folder to start from, or a new model's "
            "config.model.sizes, as configs/toybox_base.py does"
        )
    if config.data.source == "toybox":
        _validate_toybox(config)
    elif config.objective in ENCODER_OBJECTIVES:
        raise UserError(
            f"config.data.source = {config.data.source!r}: {config.objective} learns "
            "what Toybox knows of its pictures; give 'toybox'"
        )


def _validate_toybox(config):
    """The sizes of a data set that is yet to be made."""
    if config.evaluation.scenes > config.data.test_size:
        raise UserError(
            f"config.evaluation.scenes = {config.evaluation.scenes}: there are only "
            f"config.data.test_size = {config.data.test_size} of them"
        )
    for field in ("pictures", "validation_scenes"):
        if config.evaluation[field] > config.data.validation_size:
            raise UserError(
                f"config.evaluation.{field} = {config.evaluation[field]}: there are "
                f"only config.data.validation_size = {config.data.validation_size}"
            )
    pairs, count = config.batch_size * config.accumulate, config.data.train_size
    if pairs > count:
        raise UserError(
            f"config.data.train_size = {count}: a step takes {_step_pairs(config)}; "
            f"give at least {pairs}, or {smaller_step(config, count)}"
        )


def _step_pairs(config):
    product = f"config.batch_size = {config.batch_size}"
    if config.accumulate > 1:
        product += f" times config.accumulate = {config.accumulate}"
    return product + " pairs"


def smaller_step(config, count, shares=None):
    """What to give instead of a step that takes more than `count` pairs, in words.

    Args:
      shares: devices that a batch is divided among; None takes them from `config.mesh`, as far as it
        says.
    """
    shares = shares or max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)
    largest = count // config.accumulate // shares * shares
    if largest:
        return f"config.batch_size = {largest} at most"
    most = count // shares
    if most:
        return f"config.batch_size = {shares} and config.accumulate = {most} at most"
    return f"fewer devices than {shares} in config.mesh.data and config.mesh.fsdp"


def require_pairs(config, path, count, shares):
    """Checks that a prepared data set of `count` pairs has enough of them for a step.

    Args:
      path: of the data set.
      shares: devices that a batch is divided among.

    Raises:
      UserError: a step takes more.
    """
    if config.batch_size * config.accumulate > count:
        raise UserError(
            f"config.batch_size = {config.batch_size}: {path} has {count} pairs to train on, "
            f"and a step takes {_step_pairs(config)}; give "
            f"{smaller_step(config, count, shares)}, or prepare more pairs"
        )


def complete(config):
    """A copy of a ConfigDict, with the fields that an older run's lacks."""
    values = config.to_dict()
    for name, value in _ADDED.items():
        *groups, field = name.split(".")
        group = functools.reduce(lambda parent, key: parent.setdefault(key, {}), groups, values)
        group.setdefault(field, value)
    return ml_collections.ConfigDict(values)


def _flatten(values, prefix=""):
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _OPTIONAL:
            yield from _flatten(value, name + ".")
        else:
            yield name, value


def to_json(config):
    """The configuration as the text of `config.json`."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def changed_fields(old, new):
    """Fields whose change makes another run of it: ["config.beta = 2.0 (now 3.0)", ...]."""
    old, new = (_ADDED | dict(_flatten(values)) for values in (old, new))
    for values in (old, new):  # Older runs have one number.
        if isinstance(chance := values.get("condition_dropout"), numbers.Real):
            values["condition_dropout"] = [chance] * 3
    return [
        f"config.{name} = {old.get(name)!r} (now {new.get(name)!r})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _MAY_CHANGE
    ]
