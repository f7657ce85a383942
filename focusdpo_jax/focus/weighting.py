"""Computes the spatial weight W of each latent location in the loss.

    W = background + M_prior (f + lambda_s (1 - M') + gate lambda_d M_d + lambda_c U)
    f = 1 - (1 - gate) (1 - matched) M'

Inside the subjects, locations that do not match a reference yet (M_s = M_prior and not M') have
high priority, and those that match (M') low priority. Once structure is aligned the gate opens: M'
gets full weight again, and detail M_d gets more weight. Uncertainty U of the reference model adds
weight in any case. The priorities, and that detail is disabled while structure is misaligned, are
[known] (FocusDPO, arXiv 2509.01181, pipeline figure). The formula is [ours]. The scale of W has no
effect, since `losses.weighted_mean` divides by its sum.

Each of a pair's two images has its own map; stack them along the batch, or call twice.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.array_types import AnyArray, Scalar
from focusdpo_jax.focus import correspondence
from focusdpo_jax.focus.buckets import BucketParams, BucketStructure
from focusdpo_jax.focus.correspondence import Match

# Per-example values, each [B]; which ones exist depends on the bucket's structure.
Diagnostics = dict[str, Float[Array, "batch"]]


def uniform_weights(
    prior: Float[AnyArray, "batch height width"],
) -> Float[Array, "batch height width"]:
    """Returns W = 1, for Diffusion-DPO or the denoising loss; reads only the prior's shape."""
    return jnp.ones(prior.shape, jnp.float32)


def prior_weights(
    prior: Float[AnyArray, "batch height width"], background: Scalar
) -> Float[Array, "batch height width"]:
    """Returns W = background + M_prior, the static mask that is FocusDPO's baseline."""
    return jnp.asarray(background + prior)


def quality_weights(
    quality: Float[AnyArray, "batch height width"],
) -> tuple[Float[Array, "batch height width"], Float[Array, "batch height width"]]:
    """Computes PatchDPO's weights of chosen and rejected image: `W^w = 1 - q`, `W^l = q`.

    The authors' public training code weights its target image by 1 - r and its contrast image by r.
    To use this quality as r, and to use one map for both images since they share their layout, is
    [ours].

    Args:
      quality: patch quality q of the rejected image in [0, 1] (`correspondence.patch_quality`).
    """
    quality = jax.lax.stop_gradient(jnp.asarray(quality))
    return 1 - quality, quality


def gate(
    alignment: Float[AnyArray, "batch"],
    tau: Scalar,
    gate_width: Scalar,
) -> Float[Array, "batch"]:
    """Computes the factor of the detail term, in [0, 1] [ours].

    Hard if gate_width is 0: 1 where alignment >= tau, else 0.
    Soft if gate_width > 0: sigmoid((alignment - tau) / gate_width).
    """
    width = jnp.asarray(gate_width, alignment.dtype)
    hard = (alignment >= tau).astype(alignment.dtype)
    soft = jax.nn.sigmoid((alignment - tau) / jnp.where(width > 0, width, 1))
    return jnp.where(width > 0, soft, hard)


def focus_weights(
    structure: BucketStructure,
    params: BucketParams,
    prior: Float[AnyArray, "batch height width"],
    match: Match | None = None,
    detail: Float[AnyArray, "batch height width"] | None = None,
    uncertainty: Float[AnyArray, "batch height width"] | None = None,
) -> tuple[Float[Array, "batch height width"], Diagnostics]:
    """Computes the weight map W of FocusDPO for one bucket by the formula of the module.

    Args:
      structure: the bucket's structure. Without `spaf` M' is empty, and the gate of `dpce` is
        always open, since there is no alignment score. Without `dpce` the gate is closed. Without
        any term the result equals `prior_weights`.
      params: the bucket's parameters.
      prior: M_prior, the covered share of each location, in [0, 1].
      match: the match on the latent grid (`correspondence.to_grid`); needed with `spaf`.
      detail: M_d in [0, 1] (`complexity.complexity`); needed with `dpce`.
      uncertainty: U in [0, 1] (`confidence.uncertainty`); needed with `confidence`.

    Returns:
      W, without gradient, and diagnostics [B]:
        background_share: share of the weight outside the prior; always.
        unmatched_share, matched_share: shares on M_s and on M' inside the prior; with `spaf`.
          The three sum to 1.
        alignment: `correspondence.alignment`; with `spaf`.
        gate: factor of the detail term; with `dpce`. Its mean is the gate rate.

    Raises:
      ValueError: a map that the structure needs is missing.
    """
    inputs = (
        ("match", structure.spaf, match),
        ("detail", structure.dpce, detail),
        ("uncertainty", structure.confidence, uncertainty),
    )
    for name, used, value in inputs:
        if used and value is None:
            raise ValueError(f"structure {structure} needs `{name}`")
    # Inputs of disabled terms are ignored.
    match = match if structure.spaf else None
    detail = detail if structure.dpce else None
    uncertainty = uncertainty if structure.confidence else None

    prior = jnp.asarray(prior, jnp.float32)
    diagnostics = {}
    opened = None  # The gate [B, 1, 1]; None is a closed gate, which adds no operations.
    # A test finds these operations in the compiled program by the names of the scopes.
    if match is not None:
        with jax.named_scope("spaf"):
            diagnostics["alignment"] = correspondence.alignment(match, prior)
    if detail is not None:
        with jax.named_scope("dpce"):
            diagnostics["gate"] = (
                gate(diagnostics["alignment"], params.tau, params.gate_width)
                if match is not None
                else jnp.ones(prior.shape[0], jnp.float32)
            )
            opened = diagnostics["gate"][:, None, None]

    inside = jnp.ones_like(prior)
    if match is not None:
        with jax.named_scope("spaf"):
            lowered = (1 - params.matched_weight) * match.union
            inside -= lowered if opened is None else (1 - opened) * lowered
            inside += params.lambda_s * (1 - match.union)
    if opened is not None and detail is not None:
        with jax.named_scope("dpce"):
            inside += opened * params.lambda_d * detail
    if uncertainty is not None:
        with jax.named_scope("confidence"):
            inside += params.lambda_c * uncertainty
    weights = jnp.asarray(params.background + prior * inside)

    total = jnp.sum(weights, axis=(1, 2))

    def share(region):
        return jnp.sum(weights * region, axis=(1, 2)) / jnp.where(total > 0, total, 1)

    diagnostics["background_share"] = share(1 - prior)
    if match is not None:
        diagnostics["unmatched_share"] = share(correspondence.unmatched(prior, match.union))
        diagnostics["matched_share"] = share(prior * match.union)
    return jax.lax.stop_gradient((weights, diagnostics))
