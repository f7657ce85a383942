"""The losses of a generator: supervised fine-tuning and preference objectives over one step.

What the objectives share is here once: noise, the policy's and the reference model's error maps,
the weight maps. Which of them an objective needs is decided before anything is compiled.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from focusdpo_jax.config import (
    PREFERENCE_OBJECTIVES,
    SUPERVISED_OBJECTIVES,
    dropout_chances,
)
from focusdpo_jax.diffusion.schedule import logit_normal_timesteps
from focusdpo_jax.focus import confidence, correspondence, losses, weighting
from focusdpo_jax.focus.buckets import BucketStructure, sample_timesteps
from focusdpo_jax.models.generator import Conditioning, ImageView, merge_parameters
from focusdpo_jax.training.encoding import text_is_frozen


@dataclasses.dataclass(frozen=True)
class StepStructure:
    """What one executable computes: the objective and, for `focus_dpo`, the weight's terms."""

    objective: str
    weight: BucketStructure

    def __str__(self):
        return (
            f"{self.objective} ({self.weight})"
            if self.objective == "focus_dpo"
            else (self.objective)
        )


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
    encoders where the captions are not encoded yet."""
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
    """What the denoisers are asked about, the same for policy and reference model.

    Attributes:
      latents: [B * P, h, w, C] noisy latents, of every pair the chosen picture and the rejected.
      timesteps: [B * P]; both images of a pair share theirs, and their noise.
      target: [B * P, h, w, C], what a perfect denoiser would say.
    """

    latents: jax.Array
    timesteps: jax.Array
    target: jax.Array


class Guidance(NamedTuple):
    """The part of a loss that carries no gradient.

    Attributes:
      weights: [B * P, h, w], W of every pair's chosen picture and rejected.
      reference_error: error map of the reference model, of the same shape; None where an objective
        has no reference model.
    """

    weights: jax.Array
    reference_error: jax.Array | None


class FocusMaps(NamedTuple):
    """How the weights of a batch came about, on the latent grid; None where there is no such map.

    Attributes:
      weights: [B * P, h, w], W.
      similarity: [2B, S, h, w], of each subject, on the grid and scale of its source.
      match: of [2B], each subject's and M', their union.
      unmatched: [2B, h, w], M_s.
      detail: [2B, h, w], M_d.
      uncertainty: [2B, h, w], U.
    """

    weights: jax.Array
    similarity: jax.Array | None = None
    match: correspondence.Match | None = None
    unmatched: jax.Array | None = None
    detail: jax.Array | None = None
    uncertainty: jax.Array | None = None


class Objective:
    """The loss of `config.objective`, in the two halves that `training.step` compiles.

    `guide` needs no gradient and depends on the bucket's structure; `loss` needs one and does not.
    So the expensive program, the policy's backward pass, is compiled once for all structures.

    `frozen` holds `parameters` (what is not trained, of `parts`), for the preference objectives
    `reference` (the trainable parameters as they were at the start), and where conditions are dropped
    `unconditional`. A pair loses the same conditions in the passes of the policy and of the reference
    model, of its chosen image and of its rejected.
    """

    def __init__(self, generator, config, empty_token_ids, source=None):
        """Takes the prompt [2, L] of a dropped caption, and where SPAF's similarity comes from.

        The source is one of `sources`; without SPAF there need not be any.
        """
        self._generator, self._config = generator, config
        self._empty = jnp.asarray(empty_token_ids)[None]
        self._chances = dropout_chances(config)
        self.drops = any(self._chances)
        self._pairs = config.objective not in SUPERVISED_OBJECTIVES
        self._compares = config.objective in PREFERENCE_OBJECTIVES
        self._source = source
        # Jitted to be traced once for all passes that ask alike, in whichever programs.
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

    def guide(self, structure, frozen, encoded, params, key):
        """Weights and reference errors of a batch.

        Args:
          structure: StepStructure, static.
          params: BucketParams of the bucket.
          key: of the step; `loss` draws the same noise from it.

        Returns:
          Guidance, and a dict of scalar diagnostics.
        """
        reference, captured = self._reference(structure, frozen, encoded, params, key)
        maps, diagnostics = self._weigh(structure, params, encoded, captured, reference, key)
        return Guidance(maps.weights, reference), jax.tree.map(jnp.mean, diagnostics)

    def focus_maps(self, structure, frozen, encoded, params, key):
        """`FocusMaps` of a batch, to look at: those that `guide` makes of the same arguments."""
        reference, captured = self._reference(structure, frozen, encoded, params, key)
        return self._weigh(structure, params, encoded, captured, reference, key)[0]

    def loss(self, trainable, frozen, encoded, guidance, params, key):
        """The scalar loss of a batch, and a dict of scalar diagnostics; see `focus.losses`."""
        noisy = self.noisy(encoded, params, key)
        policy, _ = self._error(trainable, frozen, encoded, noisy, key)
        if not self._pairs:
            loss, diagnostics = losses.sft(policy, guidance.weights)
            return loss.mean(), jax.tree.map(jnp.mean, diagnostics)
        chosen, rejected = (
            jax.tree.map(lambda x, i=i: x.reshape(-1, 2, *x.shape[1:])[:, i], (policy, guidance))
            for i in range(2)
        )
        if self._compares:
            loss, diagnostics = losses.diffusion_dpo(
                chosen[0],
                chosen[1].reference_error,
                rejected[0],
                rejected[1].reference_error,
                chosen[1].weights,
                rejected[1].weights,
                self._config.beta,
            )
            if self._config.anchor:
                term, more = losses.anchor(chosen[0], chosen[1].reference_error, self._config.beta)
                if self._config.anchor_fades:
                    term *= losses.preference_slope(diagnostics["margin"], self._config.beta)
                loss, diagnostics = loss + self._config.anchor * term, diagnostics | more
        else:
            loss, diagnostics = losses.patch_dpo(
                chosen[0], rejected[0], chosen[1].weights, rejected[1].weights
            )
        return loss.mean(), jax.tree.map(jnp.mean, diagnostics)

    def _reference(self, structure, frozen, encoded, params, key):
        """The reference model's error maps [2B, h, w], and what SPAF wants to see of its pass."""
        if not self._compares:
            return None, {}
        return self._error(
            frozen["reference"],
            frozen,
            encoded,
            self.noisy(encoded, params, key),
            key,
            capture=self._source.capture if structure.weight.spaf else (),
        )

    def _weigh(self, structure, params, encoded, captured, reference, key):
        """FocusMaps and per-image diagnostics [B * P]."""
        prior = encoded.prior.astype(jnp.float32)
        if self._pairs:
            prior = repeat_for_pair(prior)
        if structure.objective in ("sft", "dpo"):
            return FocusMaps(weighting.uniform_weights(prior)), {}
        if structure.objective in ("prior_dpo", "subject_sft"):
            return FocusMaps(weighting.prior_weights(prior, params.background)), {}
        if structure.objective == "patch_dpo":
            weights = weighting.quality_weights(encoded.quality.astype(jnp.float32))
            return FocusMaps(by_image(jnp.stack(weights, axis=1))), {}
        similarity = match = unmatched = detail = unsure = None
        if structure.weight.spaf:
            with jax.named_scope("spaf"):
                similarity, background, known = self._source.similarity(
                    self._conditioned(encoded, key), captured, params.index
                )
                cells = similarity.shape[2] * similarity.shape[3]
                area = encoded.area.astype(jnp.float32) * cells
                match = correspondence.to_grid(
                    correspondence.match(
                        similarity,
                        repeat_for_pair(encoded.present & known),
                        repeat_for_pair(area),
                        params.rho,
                        background,
                    ),
                    prior.shape[1:],
                )
                if self._config.focus.own_subject:
                    match = correspondence.inside_own(match, repeat_for_pair(encoded.subject_masks))
                unmatched = correspondence.unmatched(prior, match.union)
        if structure.weight.dpce:
            detail = by_image(encoded.detail).astype(jnp.float32)
        if structure.weight.confidence:
            with jax.named_scope("confidence"):
                unsure = confidence.uncertainty(reference, prior)
        weights, diagnostics = weighting.focus_weights(
            structure.weight, params, prior, match, detail, unsure
        )
        return FocusMaps(weights, similarity, match, unmatched, detail, unsure), diagnostics

    def _conditioned(self, encoded, key):
        """The pairs, without dropped references for a source that captures attention to them."""
        if not (self.drops and self._source.reads_references):
            return encoded
        _, dropped = self._dropped(encoded, key)
        return encoded.replace(present=encoded.present & ~dropped[:, None])

    def _dropped(self, encoded, key):
        return drawn_dropout(jax.random.fold_in(key, 1), len(encoded.present), self._chances)

    def noisy(self, encoded, params, key):
        """`Noisy` of a batch: what `guide` and `loss` ask the denoisers about with this key."""
        draw, time, noise = jax.random.split(jax.random.fold_in(key, 0), 3)
        schedule, batch = self._generator.schedule, len(encoded.prior)
        latents = draw_latents(draw, encoded)
        latents = by_image(latents) if self._pairs else self._learnt(latents, key)
        if self._config.timestep_logits:
            timesteps = logit_normal_timesteps(
                time, batch, schedule.timesteps, *self._config.timestep_logits
            )
        else:
            timesteps = sample_timesteps(time, params, batch)
        noise = jax.random.normal(noise, (batch, *latents.shape[1:]))
        if self._pairs:
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
        """Error map [B * P, h, w] of a model with these trainable parameters; what it captured."""
        parameters = merge_parameters(trainable, frozen["parameters"])
        conditioning = condition(self._generator, parameters, encoded)
        if self.drops:
            conditioning = self._drop(
                frozen["unconditional"], parameters, conditioning, *self._dropped(encoded, key)
            )
        prediction, captured = self._denoise(
            parameters, noisy.latents, noisy.timesteps, conditioning, capture=capture
        )
        return losses.error_map(noisy.target, prediction), captured

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
