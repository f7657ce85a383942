"""The types of objectives, and their registry."""

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
    """The weights of a batch and the maps from which they are computed, on the latent grid.

    The N images are the chosen and the rejected image of every pair in succession, or only the
    chosen images. Maps that the objective or the bucket does not use are None.

    Attributes:
      weights: [N, h, w], W.
      similarity: [N, S, g, g], similarity of each subject with each location, on the grid of its
        source.
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
    """Inputs of the weights of an objective.

    Attributes:
      structure, params: the static and the dynamic part of the step's timestep bucket.
      prior: [N, h, w] in [0, 1], M_prior; the mask of all subjects for a supervised objective.
      match, detail, uncertainty: see `FocusMaps`; None if the structure excludes them.
      quality: [B, h, w] in [0, 1], patch quality of the rejected images; None unless
        `needs_quality`.
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
      policy: [B, h, w], squared error of the trained model.
      reference: [B, h, w], squared error of the reference model, without gradient; None unless
        `needs_reference`.
      weights: [B, h, w], W, without gradient.
      prior: [B, h, w] in [0, 1], M_prior.
      residual: [B, h, w, C], prediction minus target of the trained model.
    """

    policy: Map
    reference: Map | None
    weights: Map
    prior: Map
    residual: Float[Array, "images height width channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorObjective:
    """An objective that trains a generator.

    Attributes:
      name: the value of `config.objective`.
      title: title in tables and model cards.
      weights: WeightInputs -> (W [N, h, w], diagnostics).
      loss: (ImageErrors of the chosen images, ImageErrors of the rejected images or None, config)
        -> (loss [B], diagnostics). It reads `config.beta` and, of a
        preference objective, the fields that `dpo.preference_loss` lists.
      reads_rejected: whether it reads both images of a pair, or only the chosen one.
      needs_reference: whether it compares the policy with a reference model, which is the initial
        model.
      uses_focus: whether its weights depend on the timestep. Then `config.focus` defines the
        buckets and their terms. Otherwise there is one bucket of all timesteps, without terms.
      needs_quality: whether it reads the patch quality of rejected images.
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
    """An objective that trains one of Toybox's encoders or its probe on single images.

    Attributes:
      name: the value of `config.objective`.
      title: title in tables and model cards.
      exports: parts of the generator that an export of the run contains.
      parameters: (model, key) -> (trainable, frozen) trees.
      make_loss: model -> loss (trainable, frozen, batch, reference outputs, params, key) ->
        (scalar, diagnostics).
      finish: (model, trained tree, function that returns validation images) -> the model to save.
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
      ValueError: another objective has the same name.
    """
    if registered.setdefault(objective.name, objective) is not objective:
        raise ValueError(f"there are two objectives {objective.name!r}")
    return objective
