"""Display names, units and directions of metrics."""

from collections.abc import Collection, Mapping
from typing import Any

from focusdpo_jax.toybox.metrics import LOWER_IS_BETTER

ENCODERS = {"dino": "DINO", "dinov2": "DINOv2", "clip_i": "CLIP-I"}
"""Display names of the image encoders, by the prefix of their metrics."""

_KINDS = {"crop": "of subjects", "leakage": "leakage"}
# A report sorts its cases by the first of these that was computed.
_HEADLINES = (
    "fidelity",
    "dinov2_crop",
    "dino_crop",
    "clip_i_crop",
    "dino",
    "dinov2",
    "clip_i",
    "clip_t",
)


def title(name: str) -> str:
    """Returns a metric's display name: "DINOv2 leakage" for "dinov2_leakage"."""
    if name == "clip_t":
        return "CLIP-T"
    if name in ENCODERS:
        return ENCODERS[name]
    encoder, _, kind = name.rpartition("_")
    if encoder in ENCODERS and kind in _KINDS:
        return f"{ENCODERS[encoder]} {_KINDS[kind]}"
    return name.replace("_", " ")


def is_similarity(name: str) -> bool:
    """Returns whether a metric is a cosine, or a difference of cosines, rather than a fraction."""
    return name == "clip_t" or name in ENCODERS or name.rpartition("_")[0] in ENCODERS


def lower_is_better(name: str) -> bool:
    """Returns whether lower is better: for metrics that count errors, and for leakage."""
    return name in LOWER_IS_BETTER or name.endswith("_leakage")


def headline(names: Collection[str]) -> str:
    """Returns the most informative metric for single images."""
    return next((name for name in _HEADLINES if name in names), next(iter(names)))


def format_value(name: str, value: float | None, *, signed: bool = False) -> str:
    """Formats a value: fractions in per cent, cosines with three decimals; "-" for None."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if is_similarity(name):
        return f"{value:{sign}.3f}"
    return f"{100 * value:{sign}.1f} %"


def format_interval(name: str, estimate: Mapping[str, Any], *, signed: bool = False) -> str:
    """Formats an estimate (dict): its value and, in brackets, its interval without units."""
    if not estimate["n"]:
        return "-"
    ends = [
        format_value(name, estimate[end], signed=signed).removesuffix(" %")
        for end in ("low", "high")
    ]
    return f"{format_value(name, estimate['mean'], signed=signed)} [{ends[0]}, {ends[1]}]"
