"""The two functions of a generator's training step: the reference pass and the loss.

This module contains what all objectives share: noise, condition dropout, the error maps of policy
and reference model, and the maps that the spatial weights are computed from.
`focusdpo_jax.objectives` contains the objectives themselves.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from focusdpo_jax import objectives
from focusdpo_jax.diffusion.schedule import logit_normal_timesteps
from focusdpo_jax.focus import confidence, correspondence, losses
from focusdpo_jax.focus.buckets import BucketStructure, sample_timesteps
from focusdpo_jax.focus.grids import share_on_grid
from focusdpo_jax.models.generator import Conditioning, ImageView, merge_parameters
from focusdpo_jax.objectives import FocusMaps, GeneratorObjective, ImageErrors, WeightInputs
from focusdpo_jax.training.encoding import text_is_frozen


@dataclasses.dataclass(frozen=True)
class StepStructure:
    """Static arguments of a reference pass: the objective and the terms of its spatial weight."""

    objective: GeneratorObjective
    weight: BucketStructure

    def __str__(self):
        name = self.objective.name
        return f"{name} ({self.weight})" if self.objective.uses_focus else name


def draw_latents(key, encoded):
    """Samples latents [B, P, h, w, C] from the posteriors; the images of a pair share the noise."""
    noise = jax.random.normal(key, encoded.latents_mean[:, 0].shape)[:, None]
    return (
        encoded.latents_mean.astype(jnp.float32)
        + encoded.latents_deviation.astype(jnp.float32) * noise
    )


def by_image(x):
    """Reshapes [B, P, ...] to [B * P, ...]; the images of a pair are adjacent, on one device."""
    return x.reshape(-1, *x.shape[2:])


def repeat_for_pair(tree):
    """Repeats every row of a tree's arrays [B, ...] twice in succession: [2B, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), tree)


def condition(generator, parameters, encoded):
    """Returns the `Conditioning` [B] of a batch.

    The subject adapter of `parameters` encodes the references. The text encoders of `parameters`
    encode the captions if they are not encoded yet.
    """
    text, pooled = encoded.text, encoded.pooled
    if text is None:
        text, pooled = generator.encode_text(parameters, encoded.token_ids)
    tokens = generator.subject_tokens(parameters, encoded.references)
    return Conditioning(
        text=text,
        pooled=pooled,
        time_ids=encoded.time_ids,
        image_tokens=tokens,
        image_present=encoded.present,
    )


@flax.struct.dataclass
class Unconditional:
    """Replacements for dropped conditions: those of guidance's unconditional branch.

    Attributes:
      text, pooled: [1, L, D] and [1, P], embeddings of the empty caption; None if the text encoders
        are trained, which then encode it in every step.
      blank: features from `Generator.blank_reference`.
    """

    text: jax.Array | None
    pooled: jax.Array | None
    blank: ImageView | None


def encode_unconditional(generator, config, parameters, empty):
    """Returns the `Unconditional` of a run, which is the same in every step.

    Args:
      parameters: {part: tree} with at least the frozen encoders.
      empty: int [1, 2, L], tokens of the empty caption.
    """
    text = pooled = None
    if text_is_frozen(config):
        text, pooled = generator.encode_negative(parameters, empty)
    return Unconditional(text, pooled, generator.blank_reference(parameters))


def drawn_dropout(key, batch, chances):
    """Samples which pairs of a batch lose their caption, and which their references.

    Args:
      key: PRNG key.
      batch: number of pairs.
      chances: probabilities of losing only the caption, only the references, and both.

    Returns:
      Two bool [batch]: dropped captions, dropped references.
    """
    caption, references, both = chances
    u = jax.random.uniform(key, (batch,))
    return u < caption + both, (u >= caption) & (u < caption + both + references)


class Noisy(NamedTuple):
    """Input and target of the denoiser, the same for policy and reference model.

    Attributes:
      latents: [B * P, h, w, C], noisy latents of the chosen and the rejected image of every pair.
      timesteps: [B * P]; both images of a pair share the timestep and the noise.
      target: [B * P, h, w, C], the prediction of a perfect denoiser.
    """

    latents: jax.Array
    timesteps: jax.Array
    target: jax.Array


class ReferenceOutputs(NamedTuple):
    """Outputs of the reference pass that the loss reads, without gradient.

    Attributes:
      weights: [N, h, w], spatial weights W of every image; see `FocusMaps`.
      reference_error: [N, h, w], error map of the reference model; None if the objective has no
        reference model.
    """

    weights: jax.Array
    reference_error: jax.Array | None


class _Observed(NamedTuple):
    """What the focus maps read of a model: its error maps [2B, h, w], and captured activations."""

    error: jax.Array | None
    captured: dict[str, jax.Array]


class GeneratorStep:
    """The two functions of a step of `config.objective`, which `training.step` compiles.

    `reference_pass` needs no gradient and depends on the bucket's structure. `loss` is
    differentiated and does not depend on it, so that the expensive backward pass is compiled once
    for all structures.

    `frozen` has up to three entries: `parameters`, the frozen ones of `parts`; `reference`, a copy
    of the initial trainable parameters, if the objective needs a reference model; and
    `unconditional`, if conditions are dropped. For the reference pass it also has `policy`, the
    current trainable parameters, if the step `reads_policy`. Dropped conditions are the same for policy and
    reference model and for both images of a pair.
    """

    def __init__(self, generator, config, empty_token_ids, source: Any = None):
        """Initialises the step.

        Args:
          generator: a `models.generator.Generator`.
          config: configuration of the run.
          empty_token_ids: int [2, L], the tokens of the empty caption.
          source: source of SPAF's similarity, from `sources.make_source`; None without SPAF.
        """
        self._generator, self._config = generator, config
        self._empty = jnp.asarray(empty_token_ids)[None]
        self._chances = config.dropout_chances
        self.drops = any(self._chances)
        self.objective = objectives.get_generator(config.objective)
        self._source = source
        # Jitted, so that passes of equal arguments are traced once, in whichever program.
        self._denoise = jax.jit(generator.denoise, static_argnames="capture")

    @property
    def reads_policy(self):
        """Whether the focus maps are computed from the policy's activations and errors."""
        return self.objective.uses_focus and self._config.focus.observed == "policy"

    @property
    def parts(self):
        """Of the generator, whose parameters the step reads; the others need not be there."""
        parts = {"unet", "adapter"}
        if not text_is_frozen(self._config):
            parts |= {"text_encoder", "text_encoder_2"}
        return parts

    def unconditional(self, parameters):
        """`encode_unconditional` of this run, which goes into `frozen` where the run `drops`."""
        return encode_unconditional(self._generator, self._config, parameters, self._empty)

    def reference_pass(self, structure, frozen, encoded, params, key):
        """Computes the weights and the reference errors of a batch.

        Args:
          structure: StepStructure, static.
          frozen: see the class.
          encoded: EncodedPairs of B pairs.
          params: BucketParams of the bucket.
          key: PRNG key of the step; `loss` draws the same noise from it.

        Returns:
          ReferenceOutputs, and a dict of scalar diagnostics.
        """
        reference, observed = self._observe(structure, frozen, encoded, params, key)
        maps, diagnostics = self._weigh(structure, params, encoded, observed, key)
        return ReferenceOutputs(maps.weights, reference), jax.tree.map(jnp.mean, diagnostics)

    def focus_maps(self, structure, frozen, encoded, params, key):
        """Returns the `FocusMaps` of a batch, for visualisation; arguments as `reference_pass`."""
        _, observed = self._observe(structure, frozen, encoded, params, key)
        return self._weigh(structure, params, encoded, observed, key)[0]

    def loss(self, trainable, frozen, encoded, outputs, params, key):
        """Computes the loss of a batch.

        Args:
          trainable: the trainable parameters.
          outputs: ReferenceOutputs of the same batch and key.
          frozen, encoded, params, key: see `reference_pass`.

        Returns:
          The scalar loss, and a dict of scalar diagnostics; see `focus.losses`.
        """
        noisy = self.noisy(encoded, params, key)
        policy, residual, _ = self._error(trainable, frozen, encoded, noisy, key)
        errors = ImageErrors(
            policy, outputs.reference_error, outputs.weights, self._prior(encoded), residual
        )
        chosen, rejected = errors, None
        if self.objective.reads_rejected:
            chosen, rejected = (
                jax.tree.map(lambda x, i=i: x.reshape(-1, 2, *x.shape[1:])[:, i], errors)
                for i in range(2)
            )
        loss, diagnostics = self.objective.loss(chosen, rejected, self._config)
        return loss.mean(), jax.tree.map(jnp.mean, diagnostics)

    def _observe(self, structure, frozen, encoded, params, key):
        """Returns the reference model's error maps [2B, h, w] or None, and an `_Observed`."""
        if not self.objective.needs_reference:
            return None, _Observed(None, {})
        noisy = self.noisy(encoded, params, key)
        capture = self._source.capture if structure.weight.spaf else ()
        from_policy = self.reads_policy and bool(capture or structure.weight.confidence)
        reference, _, captured = self._error(
            frozen["reference"],
            frozen,
            encoded,
            noisy,
            key,
            capture=() if from_policy else capture,
        )
        if not from_policy:
            return reference, _Observed(reference, captured)
        policy, _, captured = self._error(
            frozen["policy"], frozen, encoded, noisy, key, capture=capture
        )
        return reference, _Observed(policy, captured)

    def _weigh(self, structure, params, encoded, observed, key):
        """Returns the FocusMaps and diagnostics per image, [N]."""
        prior = self._prior(encoded)
        similarity = match = unmatched = detail = uncertainty = None
        if structure.weight.spaf:
            with jax.named_scope("spaf"):
                similarity, match = self._match(encoded, observed.captured, params, prior, key)
                unmatched = correspondence.unmatched(prior, match.union)
        if structure.weight.dpce:
            detail = by_image(encoded.detail).astype(jnp.float32)
        if structure.weight.confidence:
            with jax.named_scope("confidence"):
                uncertainty = confidence.uncertainty(observed.error, prior)
        weights, diagnostics = structure.objective.weights(
            WeightInputs(
                structure.weight,
                params,
                prior,
                match,
                detail,
                uncertainty,
                encoded.quality if self.objective.needs_quality else None,
            )
        )
        return FocusMaps(weights, similarity, match, unmatched, detail, uncertainty), diagnostics

    def _prior(self, encoded):
        """Returns M_prior of every image, [N, h, w]."""
        prior = encoded.prior.astype(jnp.float32)
        return repeat_for_pair(prior) if self.objective.reads_rejected else prior

    def _match(self, encoded, captured, params, prior, key):
        """Returns SPAF's similarity, and its `Match` on the grid of `prior`."""
        similarity, background, known = self._source.similarity(
            self._conditioned(encoded, key), captured, params.index
        )
        cells = similarity.shape[2] * similarity.shape[3]
        area = encoded.area.astype(jnp.float32) * cells
        focus, coverage = self._config.focus, None
        if focus.coverage:
            coverage = repeat_for_pair(share_on_grid(encoded.subject_masks, similarity.shape[2:]))
        match = correspondence.match(
            similarity,
            repeat_for_pair(encoded.present & known),
            repeat_for_pair(area),
            params.rho,
            background,
            coverage,
        )
        match = correspondence.to_grid(match, prior.shape[1:])
        if focus.own_subject or focus.coverage:
            match = correspondence.inside_own(match, repeat_for_pair(encoded.subject_masks))
        return similarity, match

    def _conditioned(self, encoded, key):
        """Removes dropped references from the pairs if the source captures attention to them."""
        if not (self.drops and self._source.reads_references):
            return encoded
        _, dropped = self._dropped(encoded, key)
        return encoded.replace(present=encoded.present & ~dropped[:, None])

    def _dropped(self, encoded, key):
        return drawn_dropout(jax.random.fold_in(key, 1), len(encoded.present), self._chances)

    def noisy(self, encoded, params, key):
        """Returns the `Noisy` input of the denoiser for a batch and the key of the step."""
        posterior_key, time_key, noise_key = jax.random.split(jax.random.fold_in(key, 0), 3)
        schedule, batch = self._generator.schedule, len(encoded.prior)
        latents = draw_latents(posterior_key, encoded)
        if self.objective.reads_rejected:
            latents = by_image(latents)
        else:
            latents = self._supervised_latents(latents, key)
        if self._config.timestep_logits:
            timesteps = logit_normal_timesteps(
                time_key, batch, schedule.timesteps, *self._config.timestep_logits
            )
        else:
            timesteps = sample_timesteps(time_key, params, batch)
        noise = jax.random.normal(noise_key, (batch, *latents.shape[1:]))
        if self.objective.reads_rejected:
            timesteps, noise = repeat_for_pair((timesteps, noise))
        return Noisy(
            schedule.add_noise(latents, noise, timesteps),
            timesteps,
            schedule.target(latents, noise, timesteps),
        )

    def _supervised_latents(self, latents, key):
        """Selects the latents [B, ...] that a supervised objective trains on, from [B, P, ...]."""
        chosen, share = latents[:, 0], self._config.rejected_share
        if not share:
            return chosen
        rejected = jax.random.bernoulli(jax.random.fold_in(key, 2), share, (len(chosen), 1, 1, 1))
        return jnp.where(rejected, latents[:, 1], chosen)

    def _error(self, trainable, frozen, encoded, noisy, key, capture=()):
        """Returns error map [N, h, w] and residual [N, h, w, C] of a model, and activations."""
        parameters = merge_parameters(trainable, frozen["parameters"])
        conditioning = condition(self._generator, parameters, encoded)
        if self.drops:
            conditioning = self._drop(
                frozen["unconditional"], parameters, conditioning, *self._dropped(encoded, key)
            )
        prediction, captured = self._denoise(
            parameters, noisy.latents, noisy.timesteps, conditioning, capture=capture
        )
        residual = prediction.astype(jnp.float32) - noisy.target
        return losses.error_map(noisy.target, prediction), residual, captured

    def _drop(self, unconditional, parameters, conditioning, no_caption, no_references):
        """Replaces captions and references where `no_caption` and `no_references`, bool [B]."""
        text, pooled = unconditional.text, unconditional.pooled
        if text is None:
            text, pooled = self._generator.encode_negative(parameters, self._empty)
        conditioning = conditioning.replace(
            text=jnp.where(no_caption[:, None, None], text, conditioning.text),
            pooled=jnp.where(no_caption[:, None], pooled, conditioning.pooled),
        )
        return self._generator.drop_references(
            parameters, conditioning, no_references, unconditional.blank
        )
