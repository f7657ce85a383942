"""What the measures are called, in which unit they are, and where better is."""

from focusdpo_jax.toybox.metrics import LOWER_IS_BETTER

ENCODERS = {"dino": "DINO", "dinov2": "DINOv2", "clip_i": "CLIP-I"}
"""The encoders of images, by the prefix of their measures."""

_KINDS = {"crop": "of subjects", "leakage": "leakage"}
# What a report sorts its cases by: the first of these that was measured.
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


def title(name):
    """A measure's name for people: "DINOv2 leakage" for "dinov2_leakage"."""
    if name == "clip_t":
        return "CLIP-T"
    if name in ENCODERS:
        return ENCODERS[name]
    encoder, _, kind = name.rpartition("_")
    if encoder in ENCODERS and kind in _KINDS:
        return f"{ENCODERS[encoder]} {_KINDS[kind]}"
    return name.replace("_", " ")


def is_similarity(name):
    """Whether a measure is a cosine, or a difference of cosines, and not a share."""
    return name == "clip_t" or name in ENCODERS or name.rpartition("_")[0] in ENCODERS


def lower_is_better(name):
    """Whether less of a measure is better: those of mistakes, and leakage by any encoder."""
    return name in LOWER_IS_BETTER or name.endswith("_leakage")


def headline(names):
    """The measure that tells most of a single image."""
    return next((name for name in _HEADLINES if name in names), next(iter(names)))


def format_value(name, value, *, signed=False):
    """A value as text: shares in per cent, cosines with three decimals; "-" for None."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if is_similarity(name):
        return f"{value:{sign}.3f}"
    return f"{100 * value:{sign}.1f} %"


def format_interval(name, estimate, *, signed=False):
    """An estimate (dict) as text: its value and, in brackets, its interval without units."""
    if not estimate["n"]:
        return "-"
    ends = [
        format_value(name, estimate[end], signed=signed).removesuffix(" %")
        for end in ("low", "high")
    ]
    return f"{format_value(name, estimate['mean'], signed=signed)} [{ends[0]}, {ends[1]}]"
