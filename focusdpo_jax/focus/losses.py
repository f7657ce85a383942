"""Objectives over error maps: spatially weighted Diffusion-DPO, and supervised fine-tuning.

Everything FocusDPO changes about Diffusion-DPO is the weight map W. The objective below takes it
as an argument, so `W = 1` *is* Diffusion-DPO and every method of the comparison shares this code.

Shapes: B pairs, and a latent grid of h x w locations. All maps are [B, h, w].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.array_types import AnyArray, Scalar

# Per-pair figures, each [B]; their mean over the batch is what a log shows.
Diagnostics = dict[str, Float[Array, "batch"]]


def _at_least_float32(x: AnyArray) -> AnyArray:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def error_map(
    target: Float[AnyArray, "batch height width channels"],
    prediction: Float[AnyArray, "batch height width channels"],
) -> Float[Array, "batch height width"]:
    """A denoiser's squared error at each location: `d[i] = mean_c (target - prediction)[i, c]^2`.

    Args:
      target: what the denoiser should have said (`NoiseSchedule.target`).
      prediction: what it said, of any float type.

    Returns:
      The error map, in float32 at least: bfloat16 has no digits left for the differences of
      errors that a preference is made of.
    """
    difference = _at_least_float32(target) - _at_least_float32(prediction)
    return jnp.mean(jnp.square(difference), axis=-1)


def weighted_mean(
    weights: Float[AnyArray, "batch height width"],
    values: Float[AnyArray, "batch height width"],
) -> Float[Array, "batch"]:
    """`<W, d> = sum(W d) / sum(W)`, one number an example. No gradient reaches the weights.

    The scale of W cancels, its shape remains. An example whose weights are all zero has nothing
    to say and gives 0.
    """
    weights = jax.lax.stop_gradient(_at_least_float32(weights))
    total = jnp.sum(weights, axis=(1, 2))
    weighted = jnp.sum(weights * values, axis=(1, 2))
    return weighted / jnp.where(total > 0, total, 1)


def diffusion_dpo(
    policy_chosen: Float[AnyArray, "batch height width"],
    reference_chosen: Float[AnyArray, "batch height width"],
    policy_rejected: Float[AnyArray, "batch height width"],
    reference_rejected: Float[AnyArray, "batch height width"],
    weights_chosen: Float[AnyArray, "batch height width"],
    weights_rejected: Float[AnyArray, "batch height width"],
    beta: Scalar,
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """Diffusion-DPO under a weight map for each image of the pair.

        margin = <W^w, d_policy(z^w) - d_ref(z^w)> - <W^l, d_policy(z^l) - d_ref(z^l)>
        loss   = -log sigmoid(-(beta / 2) margin)

    With W = 1 this is Wallace et al. 2023 (arXiv 2311.12908, eq. 14, constant timestep weighting)
    with errors averaged, not summed, over the latent: the scale on which beta = 5000 is published
    for SDXL. That FocusDPO keeps the objective and moves the weight is [known]; that each side is
    normalised by its own sum of weights is [ours].

    Args:
      policy_chosen, policy_rejected: error maps of the model in training (`error_map`).
      reference_chosen, reference_rejected: error maps of the frozen reference model at the same
        timestep and noise. No gradient flows through them.
      weights_chosen, weights_rejected: weights >= 0; no gradient flows through them.
      beta: strength of the pull towards the reference model, > 0; may be traced.

    Returns:
      The loss of each pair [B], and per-pair diagnostics [B]:
        margin: negative where the policy prefers the chosen image more than the reference does.
        logit_scale: |beta / 2 margin|. It compares values of beta between objectives: far below 1
          the loss is linear in the margin, and beta only scales the gradient; above about 4 a
          pair's gradient vanishes or has its full size.
        implicit_accuracy: 1 where margin < 0, 0.5 where it is 0 and 0 elsewhere, so that the mean
          is the share of pairs won. Policy and reference that are one model tie: 0.5.
        winner_error_difference, loser_error_difference: the margin's two terms. A loser's that
          grows while the winner's does not fall is DPO's known failure.
        reference_error: the reference model's weighted error, mean of both images.
    """
    reference_chosen, reference_rejected = jax.lax.stop_gradient(
        (reference_chosen, reference_rejected)
    )
    winner = weighted_mean(weights_chosen, policy_chosen - reference_chosen)
    loser = weighted_mean(weights_rejected, policy_rejected - reference_rejected)
    margin = winner - loser
    # -log sigmoid(-x) = softplus(x), which neither overflows nor loses small losses.
    loss = jax.nn.softplus(0.5 * beta * margin)
    reference_error = 0.5 * (
        weighted_mean(weights_chosen, reference_chosen)
        + weighted_mean(weights_rejected, reference_rejected)
    )
    diagnostics = {
        "margin": margin,
        "logit_scale": jnp.abs(0.5 * beta * margin),
        "implicit_accuracy": jnp.where(margin == 0, 0.5, margin < 0).astype(margin.dtype),
        "winner_error_difference": winner,
        "loser_error_difference": loser,
        "reference_error": reference_error,
    }
    return loss, jax.lax.stop_gradient(diagnostics)


def anchor(
    policy_chosen: Float[AnyArray, "batch height width"],
    reference_chosen: Float[AnyArray, "batch height width"],
    beta: Scalar,
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """What is added to a preference loss to keep the chosen image likely as a whole.

        anchor = (beta / 4) mean(d_policy(z^w) - d_ref(z^w))

    A margin also grows where both errors do, the rejected image's faster; and outside the mask,
    where the two images are one, the weight's background cancels in it and holds nothing. The
    denoising error of the chosen image is the usual cure: supervised fine-tuning beside the
    preference, as in Pang et al. 2024 (arXiv 2404.19733). [ours]

    Args:
      policy_chosen, reference_chosen: error maps, as for `diffusion_dpo`. The reference's only
        moves the zero; it has no gradient.
      beta: as for `diffusion_dpo`. Its quarter is the slope of that loss where policy and reference
        are one model, so that there an error counts the same in both.

    Returns:
      The term of each pair [B], and the diagnostic `chosen_error_difference`, the mean of the
      formula.
    """
    difference = jnp.mean(policy_chosen - jax.lax.stop_gradient(reference_chosen), axis=(1, 2))
    term = jnp.asarray(0.25 * beta * difference)
    return term, {"chosen_error_difference": jax.lax.stop_gradient(difference)}


def preference_slope(margin: Float[AnyArray, "batch"], beta: Scalar) -> Float[Array, "batch"]:
    """`2 sigmoid((beta / 2) margin)`: how steep the preference loss is, over its slope at margin 0.

    An anchor multiplied by this factor fades with the preference. A constant anchor becomes the larger part of
    the gradient: the slope of the preference falls with each pair that is won. [ours]

    Args:
      margin, beta: as of `diffusion_dpo`.

    Returns:
      A factor in (0, 2) without gradient; 1 where policy and reference are one model.
    """
    return 2 * jax.nn.sigmoid(0.5 * beta * jax.lax.stop_gradient(margin))


def sft(
    policy_chosen: Float[AnyArray, "batch height width"],
    weights_chosen: Float[AnyArray, "batch height width"],
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """Supervised fine-tuning: the weighted denoising error of the chosen image alone.

        loss = <W^w, d_policy(z^w)>

    Args:
      policy_chosen: error map of the model in training on the chosen image.
      weights_chosen: weights >= 0; `weighting.uniform_weights` gives the plain denoising loss.

    Returns:
      The loss of each example [B], and the diagnostic `policy_error`, the same without gradient.
    """
    loss = weighted_mean(weights_chosen, policy_chosen)
    return loss, {"policy_error": jax.lax.stop_gradient(loss)}


def patch_dpo(
    policy_chosen: Float[AnyArray, "batch height width"],
    policy_rejected: Float[AnyArray, "batch height width"],
    weights_chosen: Float[AnyArray, "batch height width"],
    weights_rejected: Float[AnyArray, "batch height width"],
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """PatchDPO (arXiv 2412.03177): a denoising error of both images, no reference model.

        loss = sum(W^w d_policy(z^w) + W^l d_policy(z^l)) / sum(W^w + W^l)

    Both terms are learnt from, neither is pushed away: where the rejected image is good its patches
    teach too, and where it is not the chosen one's do (`weighting.quality_weights`).

    Args:
      policy_chosen, policy_rejected: error maps of the model in training (`error_map`).
      weights_chosen, weights_rejected: weights >= 0; no gradient flows through them.

    Returns:
      The loss of each pair [B], and per-pair diagnostics [B]: `winner_error` and `loser_error`,
      each image's own weighted error.
    """
    loss = weighted_mean(
        jnp.concatenate([weights_chosen, weights_rejected], axis=1),
        jnp.concatenate([policy_chosen, policy_rejected], axis=1),
    )
    diagnostics = {
        "winner_error": weighted_mean(weights_chosen, policy_chosen),
        "loser_error": weighted_mean(weights_rejected, policy_rejected),
    }
    return loss, jax.lax.stop_gradient(diagnostics)


def scale_gradient(value: Float[AnyArray, "*axes"], scale: Float[AnyArray, "*factors"]) -> Array:
    """Returns `value` with its gradient multiplied by `scale`, which broadcasts to it."""
    constant = jax.lax.stop_gradient(value)
    return jnp.asarray(constant + jax.lax.stop_gradient(scale) * (value - constant))


def winner_preserving_scale(
    residual_chosen: Float[AnyArray, "batch height width channels"],
    residual_rejected: Float[AnyArray, "batch height width channels"],
    weights_chosen: Float[AnyArray, "batch height width"],
    weights_rejected: Float[AnyArray, "batch height width"],
    mu: float = 0.0,
) -> Float[Array, "batch"]:
    """The factor of the loser's gradient under which a step does not raise the winner's error.

        g^w = W^w r^w / sum W^w, g^l = W^l r^l / sum W^l       gradients at the predictions, r residuals
        scale = (1 - mu) |g^w|^2 / (g^w . g^l), at most 1; 1 where the product is not positive

    Diffusion-SDPO (arXiv 2511.03317), whose public code takes one factor a batch and W = 1; a factor a
    pair, and the weights, are [ours].

    Args:
      residual_chosen, residual_rejected: prediction less target of the model in training.
      weights_chosen, weights_rejected: weights >= 0.
      mu: share of the winner's own step that has to remain, in [0, 1].

    Returns:
      The factor of each pair in [0, 1], without gradient.
    """

    def gradient(residual, weights):
        total = jnp.sum(weights, axis=(1, 2))
        weights = weights / jnp.where(total > 0, total, 1)[:, None, None]
        return weights[..., None] * _at_least_float32(residual)

    chosen = gradient(residual_chosen, weights_chosen)
    rejected = gradient(residual_rejected, weights_rejected)
    squared = jnp.sum(jnp.square(chosen), axis=(1, 2, 3))
    product = jnp.sum(chosen * rejected, axis=(1, 2, 3))
    limit = (1 - mu) * squared / jnp.where(product > 0, product, 1)
    return jax.lax.stop_gradient(jnp.where(product > 0, jnp.minimum(limit, 1), 1.0))
