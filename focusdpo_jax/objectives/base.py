"""The types of objectives, and the registry that holds them."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float

from focusdpo_jax.focus import weighting
from focusdpo_jax.focus.buckets import BucketParams, BucketStructure
from focusdpo_jax.focus.correspondence import Match

Map = Float[Array, "images height width"]
# Per-example values [B]; their mean over the batch is logged.
Diagnostics = dict[str, Float[Array, "batch"]]


class FocusMaps(NamedTuple):
    """The weights of a batch and the maps that they are made of, on the latent grid.

    N images: of every pair the chosen and the rejected one in succession, or the chosen ones alone. A map that
    the objective or the bucket does not use is None.

    Attributes:
      weights: [N, h, w], W.
      similarity: [N, S, g, g], of each subject with each location, on the grid of its source.
      match: each subject's match [N, S, h, w] and M', their union.
      unmatched: [N, h, w], M_s.
      detail: [N, h, w], M_d.
      uncertainty: [N, h, w], U.
    """

    weights: jax.Array
    similarity: jax.Array | None = None
    match: Match | None = None
    unmatched: jax.Array | None = None
    detail: jax.Array | None = None
    uncertainty: jax.Array | None = None


class WeightInputs(NamedTuple):
    """What the weights of an objective may depend on.

    Attributes:
      structure, params: the static and the dynamic half of the step's timestep bucket.
      prior: [N, h, w] in [0, 1], M_prior; for an objective that reads chosen images alone, all subjects.
      match, detail, uncertainty: as of `FocusMaps`; None where the structure excludes them.
      quality: [B, h, w] in [0, 1], patch quality of the rejected images; None unless `needs_quality`.
    """

    structure: BucketStructure
    params: BucketParams
    prior: Map
    match: Match | None = None
    detail: Map | None = None
    uncertainty: Map | None = None
    quality: Map | None = None


class ImageErrors(NamedTuple):
    """Error maps and weights of one image of each of B pairs.

    Attributes:
      policy: [B, h, w], squared error of the model in training.
      reference: the same of the reference model, without gradient; None unless `needs_reference`.
      weights: [B, h, w], W, without gradient.
      residual: [B, h, w, C], prediction less target of the model in training.
    """

    policy: Map
    reference: Map | None
    weights: Map
    residual: Float[Array, "images height width channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorObjective:
    """An objective that trains a generator.

    Attributes:
      name: the value of `config.objective`.
      title: for tables and model cards.
      weights: WeightInputs -> (W [N, h, w], diagnostics).
      loss: (ImageErrors of the chosen images, of the rejected ones or None, config) -> (loss [B],
        diagnostics). `config` has `beta`, `anchor`, `anchor_fades` and `preserve_winner`.
      reads_rejected: whether it reads both images of a pair, or the chosen one alone.
      needs_reference: whether it compares the policy with a reference model, the model at the start.
      uses_focus: whether its weights depend on the timestep: then `config.focus` defines the buckets and
        which terms exist. Otherwise there is one bucket of all timesteps without terms.
      needs_quality: whether the data is encoded with the patch quality of rejected images.
    """

    name: str
    title: str
    weights: Callable[[WeightInputs], tuple[Map, Diagnostics]]
    loss: Callable[[ImageErrors, ImageErrors | None, Any], tuple[jax.Array, Diagnostics]]
    reads_rejected: bool
    needs_reference: bool = False
    uses_focus: bool = False
    needs_quality: bool = False
    trains_generator: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderObjective:
    """An objective that trains one of Toybox's encoders or its probe, on images alone.

    Attributes:
      name: the value of `config.objective`.
      title: for tables and model cards.
      exports: parts of the generator that an export of the run holds.
      parameters: (model, key) -> (trainable, frozen) trees.
      make_loss: generator -> loss (trainable, frozen, batch, reference outputs, params, key) -> (scalar,
        diagnostics).
      finish: (model, trained tree, validation images as a function) -> the model to save.
    """

    name: str
    title: str
    exports: tuple[str, ...]
    parameters: Callable[..., tuple[dict, dict]]
    make_loss: Callable[..., Callable[..., Any]]
    finish: Callable[..., Any] = lambda model, trained, images: model
    trains_generator: ClassVar[bool] = False
    reads_rejected: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    uses_focus: ClassVar[bool] = False
    needs_quality: ClassVar[bool] = False


def uniform_weights(inputs: WeightInputs) -> tuple[Map, Diagnostics]:
    """Returns W = 1 [N, h, w], and no diagnostics."""
    return weighting.uniform_weights(inputs.prior), {}


def prior_weights(inputs: WeightInputs) -> tuple[Map, Diagnostics]:
    """Returns W = background + M_prior [N, h, w], and no diagnostics."""
    return weighting.prior_weights(inputs.prior, inputs.params.background), {}


registered: dict[str, GeneratorObjective | EncoderObjective] = {}


def register(objective):
    """Adds an objective to the registry, and returns it.

    Raises:
      ValueError: another one has its name.
    """
    if registered.setdefault(objective.name, objective) is not objective:
        raise ValueError(f"there are two objectives {objective.name!r}")
    return objective
