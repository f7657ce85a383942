"""The step of a generator's objective, in its two halves: the reference pass, and the loss.

What objectives share is here once: noise, dropped conditions, error maps of policy and reference model, and the
maps that weights are made of. What differs is in `focusdpo_jax.objectives`.
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
from focusdpo_jax.models.generator import Conditioning, ImageView, merge_parameters
from focusdpo_jax.objectives import FocusMaps, GeneratorObjective, ImageErrors, WeightInputs
from focusdpo_jax.training.encoding import text_is_frozen


@dataclasses.dataclass(frozen=True)
class StepStructure:
    """What one compiled reference pass computes: an objective, and the terms of its weight."""

    objective: GeneratorObjective
    weight: BucketStructure

    def __str__(self):
        name = self.objective.name
        return f"{name} ({self.weight})" if self.objective.uses_focus else name


def draw_latents(key, encoded):
    """Latents [B, P, h, w, C] of chosen and rejected (if encoded), with one draw for both."""
    draw = jax.random.normal(key, encoded.latents_mean[:, 0].shape)[:, None]
    return (
        encoded.latents_mean.astype(jnp.float32)
        + encoded.latents_deviation.astype(jnp.float32) * draw
    )


def by_image(x):
    """[B, P, ...] as [B * P, ...]: the pictures of a pair lie side by side, on one device."""
    return x.reshape(-1, *x.shape[2:])


def repeat_for_pair(tree):
    """Every row of a tree's arrays [B, ...] two times in succession: [2B, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), tree)


def condition(generator, parameters, encoded):
    """The conditioning [B] of a batch: by the subject adapter of `parameters`, and by its text
    encoders where the captions are not encoded yet.
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
    """What dropped conditions become: the conditions of guidance's unconditional branch.

    Attributes:
      text, pooled: [1, L, D] and [1, P], of the empty caption; None where the text encoders are
        trained, which then encode it in every step.
      blank: of `Generator.blank_reference`.
    """

    text: jax.Array | None
    pooled: jax.Array | None
    blank: ImageView | None


def encode_unconditional(generator, config, parameters, empty):
    """`Unconditional` of a run, which is the same in every step.

    Args:
      parameters: of the frozen encoders at least.
      empty: int [1, 2, L], tokens of the empty caption.
    """
    text = pooled = None
    if text_is_frozen(config):
        text, pooled = generator.encode_negative(parameters, empty)
    return Unconditional(text, pooled, generator.blank_reference(parameters))


def drawn_dropout(key, batch, chances):
    """Which of a batch's pairs lose their caption, and which their references.

    Args:
      chances: of losing the caption alone, the references alone, and both.

    Returns:
      Two bool [batch].
    """
    caption, references, both = chances
    draw = jax.random.uniform(key, (batch,))
    return draw < caption + both, (draw >= caption) & (draw < caption + both + references)


class Noisy(NamedTuple):
    """The input of the denoisers and their target, the same for policy and reference model.

    Attributes:
      latents: [B * P, h, w, C] noisy latents, of every pair the chosen picture and the rejected.
      timesteps: [B * P]; both images of a pair share theirs, and their noise.
      target: [B * P, h, w, C], what a perfect denoiser would predict.
    """

    latents: jax.Array
    timesteps: jax.Array
    target: jax.Array


class ReferenceOutputs(NamedTuple):
    """What a loss takes from the reference pass; it carries no gradient.

    Attributes:
      weights: [N, h, w], W of every image; see `FocusMaps`.
      reference_error: error map [N, h, w] of the reference model; None where the objective needs none.
    """

    weights: jax.Array
    reference_error: jax.Array | None


class GeneratorStep:
    """The two halves of a step of `config.objective`, which `training.step` compiles.

    `reference_pass` needs no gradient and depends on the bucket's structure; `loss` needs a gradient and does
    not. So the expensive program, the policy's backward pass, is compiled once for all structures.

    `frozen` holds `parameters` (what is not trained, of `parts`), where the objective needs a reference model
    `reference` (the trainable parameters at the start), and where conditions are dropped `unconditional`. A
    pair loses the same conditions in the passes of policy and reference model, for both of its images.
    """

    def __init__(self, generator, config, empty_token_ids, source: Any = None):
        """Initialises the step.

        Args:
          generator: a `models.generator.Generator`.
          config: of the run.
          empty_token_ids: int [2, L], the tokens of the empty caption.
          source: of SPAF's similarity, from `sources.make_source`; None where no bucket has SPAF.
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
          key: of the step; `loss` draws the same noise from it.

        Returns:
          ReferenceOutputs, and a dict of scalar diagnostics.
        """
        reference, captured = self._reference_error(structure, frozen, encoded, params, key)
        maps, diagnostics = self._weigh(structure, params, encoded, captured, reference, key)
        return ReferenceOutputs(maps.weights, reference), jax.tree.map(jnp.mean, diagnostics)

    def focus_maps(self, structure, frozen, encoded, params, key):
        """Returns the `FocusMaps` from which `reference_pass` takes the weights, for pictures."""
        reference, captured = self._reference_error(structure, frozen, encoded, params, key)
        return self._weigh(structure, params, encoded, captured, reference, key)[0]

    def loss(self, trainable, frozen, encoded, outputs, params, key):
        """Computes the loss of a batch.

        Args:
          trainable: parameters under training.
          outputs: ReferenceOutputs of the same batch and key.
          frozen, encoded, params, key: as for `reference_pass`.

        Returns:
          The scalar loss, and a dict of scalar diagnostics; see `focus.losses`.
        """
        noisy = self.noisy(encoded, params, key)
        policy, residual, _ = self._error(trainable, frozen, encoded, noisy, key)
        errors = ImageErrors(policy, outputs.reference_error, outputs.weights, residual)
        chosen, rejected = errors, None
        if self.objective.reads_rejected:
            chosen, rejected = (
                jax.tree.map(lambda x, i=i: x.reshape(-1, 2, *x.shape[1:])[:, i], errors)
                for i in range(2)
            )
        loss, diagnostics = self.objective.loss(chosen, rejected, self._config)
        return loss.mean(), jax.tree.map(jnp.mean, diagnostics)

    def _reference_error(self, structure, frozen, encoded, params, key):
        """Error maps [2B, h, w] of the reference model, and what SPAF's source captures of its pass."""
        if not self.objective.needs_reference:
            return None, {}
        error, _, captured = self._error(
            frozen["reference"],
            frozen,
            encoded,
            self.noisy(encoded, params, key),
            key,
            capture=self._source.capture if structure.weight.spaf else (),
        )
        return error, captured

    def _weigh(self, structure, params, encoded, captured, reference, key):
        """FocusMaps and per-image diagnostics [N]."""
        prior = encoded.prior.astype(jnp.float32)
        if self.objective.reads_rejected:
            prior = repeat_for_pair(prior)
        similarity = match = unmatched = detail = uncertainty = None
        if structure.weight.spaf:
            with jax.named_scope("spaf"):
                similarity, match = self._match(encoded, captured, params, prior, key)
                unmatched = correspondence.unmatched(prior, match.union)
        if structure.weight.dpce:
            detail = by_image(encoded.detail).astype(jnp.float32)
        if structure.weight.confidence:
            with jax.named_scope("confidence"):
                uncertainty = confidence.uncertainty(reference, prior)
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

    def _match(self, encoded, captured, params, prior, key):
        """SPAF's similarity, and its `Match` on the grid of `prior`."""
        similarity, background, known = self._source.similarity(
            self._conditioned(encoded, key), captured, params.index
        )
        cells = similarity.shape[2] * similarity.shape[3]
        area = encoded.area.astype(jnp.float32) * cells
        match = correspondence.match(
            similarity,
            repeat_for_pair(encoded.present & known),
            repeat_for_pair(area),
            params.rho,
            background,
        )
        match = correspondence.to_grid(match, prior.shape[1:])
        if self._config.focus.own_subject:
            match = correspondence.inside_own(match, repeat_for_pair(encoded.subject_masks))
        return similarity, match

    def _conditioned(self, encoded, key):
        """The pairs, without dropped references for a source that captures attention to them."""
        if not (self.drops and self._source.reads_references):
            return encoded
        _, dropped = self._dropped(encoded, key)
        return encoded.replace(present=encoded.present & ~dropped[:, None])

    def _dropped(self, encoded, key):
        return drawn_dropout(jax.random.fold_in(key, 1), len(encoded.present), self._chances)

    def noisy(self, encoded, params, key):
        """Returns the `Noisy` of a batch: the input of the denoisers with this key."""
        draw, time, noise = jax.random.split(jax.random.fold_in(key, 0), 3)
        schedule, batch = self._generator.schedule, len(encoded.prior)
        latents = draw_latents(draw, encoded)
        latents = by_image(latents) if self.objective.reads_rejected else self._learnt(latents, key)
        if self._config.timestep_logits:
            timesteps = logit_normal_timesteps(
                time, batch, schedule.timesteps, *self._config.timestep_logits
            )
        else:
            timesteps = sample_timesteps(time, params, batch)
        noise = jax.random.normal(noise, (batch, *latents.shape[1:]))
        if self.objective.reads_rejected:
            timesteps, noise = repeat_for_pair((timesteps, noise))
        return Noisy(
            schedule.add_noise(latents, noise, timesteps),
            timesteps,
            schedule.target(latents, noise, timesteps),
        )

    def _learnt(self, latents, key):
        """The latents [B] that a supervised objective learns from, of [B, P]."""
        chosen, share = latents[:, 0], self._config.rejected_share
        if not share:
            return chosen
        taken = jax.random.bernoulli(jax.random.fold_in(key, 2), share, (len(chosen), 1, 1, 1))
        return jnp.where(taken, latents[:, 1], chosen)

    def _error(self, trainable, frozen, encoded, noisy, key, capture=()):
        """Error map [N, h, w] and residual [N, h, w, C] of a model; what its pass captured."""
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

    def _drop(self, instead, parameters, conditioning, no_caption, no_references):
        """Takes captions and references away from the examples that `no_...`, bool [B], name."""
        text, pooled = instead.text, instead.pooled
        if text is None:
            text, pooled = self._generator.encode_negative(parameters, self._empty)
        conditioning = conditioning.replace(
            text=jnp.where(no_caption[:, None, None], text, conditioning.text),
            pooled=jnp.where(no_caption[:, None], pooled, conditioning.pooled),
        )
        return self._generator.drop_references(
            parameters, conditioning, no_references, instead.blank
        )
