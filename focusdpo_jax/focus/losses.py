"""Losses over error maps: spatially weighted Diffusion-DPO, and supervised fine-tuning.

FocusDPO changes only the weight map W of Diffusion-DPO. The losses take W as an argument, so that
`W = 1` is Diffusion-DPO, and all compared methods share this code.

Shapes: B pairs, and a latent grid of h x w locations. All maps are [B, h, w].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.array_types import AnyArray, Scalar

# Per-pair values, each [B]; their mean over the batch is logged.
Diagnostics = dict[str, Float[Array, "batch"]]


def _at_least_float32(x: AnyArray) -> AnyArray:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def error_map(
    target: Float[AnyArray, "batch height width channels"],
    prediction: Float[AnyArray, "batch height width channels"],
) -> Float[Array, "batch height width"]:
    """Computes the squared error at each location: `d[i] = mean_c (target - prediction)[i, c]^2`.

    Args:
      target: target of the denoiser (`NoiseSchedule.target`).
      prediction: output of the denoiser, of any float type.

    Returns:
      The error map in float32 or wider: bfloat16 is too coarse for the differences of errors in a
      preference loss.
    """
    difference = _at_least_float32(target) - _at_least_float32(prediction)
    return jnp.mean(jnp.square(difference), axis=-1)


def weighted_mean(
    weights: Float[AnyArray, "batch height width"],
    values: Float[AnyArray, "batch height width"],
) -> Float[Array, "batch"]:
    """Computes `<W, d> = sum(W d) / sum(W)` for each example. No gradient reaches the weights.

    The scale of W cancels. An example whose weights are all zero gives 0.
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
    beta: Scalar | Float[AnyArray, "batch"],
    loser_limit: float = 0.0,
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """Computes the Diffusion-DPO loss with a weight map for each image of the pair.

        margin = <W^w, d_policy(z^w) - d_ref(z^w)> - <W^l, d_policy(z^l) - d_ref(z^l)>
        loss   = -log sigmoid(-(beta / 2) margin)

    With W = 1 this is Wallace et al. 2023 (arXiv 2311.12908, eq. 14, constant timestep weighting)
    with errors averaged over the latent instead of summed. The published beta = 5000 for SDXL
    refers to this scale. The weights in an otherwise unchanged loss are [known]. The normalisation
    of each image's error by its own sum of weights is [ours].

    Args:
      policy_chosen, policy_rejected: error maps of the trained model (`error_map`).
      reference_chosen, reference_rejected: error maps of the frozen reference model at the same
        timestep and noise. No gradient flows through them.
      weights_chosen, weights_rejected: weights >= 0; no gradient flows through them.
      beta: strength of the regularisation towards the reference model, > 0; may be traced.
      loser_limit: if positive, the loser's term of the margin is at most this share of the
        reference model's error: beyond it, a larger error of the rejected image has no gradient
        [ours].

    Returns:
      The loss of each pair [B], and per-pair diagnostics [B]:
        margin: negative if the policy prefers the chosen image more than the reference model does.
        logit_scale: |beta / 2 margin|, for comparing beta between objectives. Far below 1 the loss
          is linear in the margin, and beta only scales the gradient. Above about 4 the gradient of
          a pair is either close to 0 or saturated.
        implicit_accuracy: 1 if margin < 0, 0.5 if it is 0, otherwise 0, so that the mean is the
          share of pairs won. It is 0.5 if policy and reference are the same model.
        winner_error_difference, loser_error_difference: the two terms of the margin, without the
          limit. DPO's known failure is a growing loser term while the winner term does not fall.
        reference_error: weighted error of the reference model, mean of both images.
    """
    reference_chosen, reference_rejected = jax.lax.stop_gradient(
        (reference_chosen, reference_rejected)
    )
    winner = weighted_mean(weights_chosen, policy_chosen - reference_chosen)
    loser = weighted_mean(weights_rejected, policy_rejected - reference_rejected)
    counted = loser
    if loser_limit:
        limit = loser_limit * weighted_mean(weights_rejected, reference_rejected)
        counted = jnp.minimum(loser, limit)
    margin = winner - counted
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
    """Computes a term for a preference loss that keeps the error of the whole chosen image low.

        anchor = (beta / 4) mean(d_policy(z^w) - d_ref(z^w))

    The preference loss also falls if both errors grow, and that of the rejected image grows faster.
    Outside the mask the two images are equal, so that their errors cancel in the margin and the
    background weight has no effect. The usual remedy is to add the denoising error of the chosen
    image, as in Pang et al. 2024 (arXiv 2404.19733). [ours]

    Args:
      policy_chosen, reference_chosen: error maps, see `diffusion_dpo`. That of the reference model
        only shifts the value and has no gradient.
      beta: see `diffusion_dpo`. beta / 4 is the slope of that loss if policy and reference are the
        same model, so that an error then has the same slope in both terms if both have this beta
        (with `config.match_beta`, the preference loss has beta over `relative_scale`).

    Returns:
      The term of each pair [B], and the diagnostic `chosen_error_difference`, the mean in the
      formula.
    """
    difference = jnp.mean(policy_chosen - jax.lax.stop_gradient(reference_chosen), axis=(1, 2))
    term = jnp.asarray(0.25 * beta * difference)
    return term, {"chosen_error_difference": jax.lax.stop_gradient(difference)}


def relative_scale(
    weights: Float[AnyArray, "batch height width"], prior: Float[AnyArray, "batch height width"]
) -> Float[Array, "batch"]:
    """Computes the scale of a weighted margin relative to that of Diffusion-DPO (W = 1) [ours].

        s = (|M_prior W| / sum W) / (|M_prior| / (h w)),   | | the Euclidean norm

    Outside M_prior the images of a pair are equal, so that their errors cancel. Inside, the
    differences of errors at different locations are taken as independent and of equal variance. The
    standard deviation of the margin then is s times that with W = 1. Therefore `beta / s` has the
    effect for the weighted loss that beta has for Diffusion-DPO.

    Args:
      weights: W >= 0.
      prior: M_prior in [0, 1].

    Returns:
      s of each example, without gradient; 1 with an empty prior or without weight inside it.
    """

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))

    weights, prior = _at_least_float32(weights), _at_least_float32(prior)
    inside, uniform = norm(prior * weights), norm(prior)
    total = jnp.mean(weights, axis=(1, 2))
    known = (inside > 0) & (uniform > 0)
    scale = inside / jnp.where(known, total * uniform, 1)
    return jax.lax.stop_gradient(jnp.where(known, scale, 1))


def preference_slope(
    margin: Float[AnyArray, "batch"], beta: Scalar | Float[AnyArray, "batch"]
) -> Float[Array, "batch"]:
    """Computes `2 sigmoid((beta / 2) margin)`, the slope of the preference loss over that at 0.

    An anchor multiplied by this factor decays with the slope of the preference loss. A constant
    anchor would dominate the gradient, since that slope falls with every pair that is won. [ours]

    Args:
      margin, beta: see `diffusion_dpo`.

    Returns:
      A factor in (0, 2) without gradient; 1 if policy and reference are the same model.
    """
    return 2 * jax.nn.sigmoid(0.5 * beta * jax.lax.stop_gradient(margin))


def sft(
    policy_chosen: Float[AnyArray, "batch height width"],
    weights_chosen: Float[AnyArray, "batch height width"],
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """Computes the supervised fine-tuning loss: the weighted denoising error of the chosen image.

        loss = <W^w, d_policy(z^w)>

    Args:
      policy_chosen: error map of the trained model on the chosen image.
      weights_chosen: weights >= 0; `weighting.uniform_weights` gives the plain denoising loss.

    Returns:
      The loss of each example [B], and the diagnostic `policy_error`, the loss without gradient.
    """
    loss = weighted_mean(weights_chosen, policy_chosen)
    return loss, {"policy_error": jax.lax.stop_gradient(loss)}


def patch_dpo(
    policy_chosen: Float[AnyArray, "batch height width"],
    policy_rejected: Float[AnyArray, "batch height width"],
    weights_chosen: Float[AnyArray, "batch height width"],
    weights_rejected: Float[AnyArray, "batch height width"],
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """Computes the loss of PatchDPO (arXiv 2412.03177), which has no reference model.

        loss = sum(W^w d_policy(z^w) + W^l d_policy(z^l)) / sum(W^w + W^l)

    Both errors are minimised. The weights select patches of the rejected image where its quality is
    high, and patches of the chosen image elsewhere (`weighting.quality_weights`).

    Args:
      policy_chosen, policy_rejected: error maps of the trained model (`error_map`).
      weights_chosen, weights_rejected: weights >= 0; no gradient flows through them.

    Returns:
      The loss of each pair [B], and per-pair diagnostics [B]: `winner_error` and `loser_error`, the
      weighted errors of the two images.
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
    """Computes a factor for the loser's gradient that keeps a step from raising the winner's error.

        g^w = W^w r^w / sum W^w, g^l = W^l r^l / sum W^l   gradients at the predictions, r residuals
        scale = (1 - mu) |g^w|^2 / (g^w . g^l), at most 1; 1 if the product is not positive

    Source: Diffusion-SDPO (arXiv 2511.03317), whose public code has one factor per batch and W = 1.
    The factor per pair and the weights are [ours].

    Args:
      residual_chosen, residual_rejected: prediction minus target of the trained model.
      weights_chosen, weights_rejected: weights >= 0.
      mu: share of the winner's own step that must remain, in [0, 1].

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
