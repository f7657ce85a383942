"""FocusDPO (arXiv 2509.01181) as pure functions of arrays. Requires only jax, numpy and jaxtyping.

Use in another trainer, with images in [0, 1], latents of h x w, and patch features of any frozen
vision model:

    import focusdpo_jax as fd

    def loss_fn(params, batch, t, noise):                    # t [B], shared by the images of a pair
        maps = fd.focus.focus_map(
            batch.images, batch.prior_mask, grid=(h, w), timesteps=t,     # images [B, 2, H, W, 3]
            image_features=batch.features, reference_features=batch.reference_features,
            reference_masks=batch.reference_masks, subject_masks=batch.masks,
        )
        policy, reference = error_maps(params, t, noise), error_maps(initial_params, t, noise)
        loss, _ = fd.focus.diffusion_dpo(                 # error maps [B, 2, h, w]: (chosen, rejected)
            policy[:, 0], reference[:, 0], policy[:, 1], reference[:, 1],
            maps.weights[:, 0], maps.weights[:, 1], beta=2000.0,
        )
        return loss.mean()

`examples/focus_in_your_trainer.ipynb` contains a complete training step. To read the method, start
with `losses` (Diffusion-DPO with a weight map), then read `correspondence` (SPAF: which part of the
image already matches a reference), `complexity` (DPCE: where the image has detail), `weighting`
(the weight map), `buckets` (how the settings depend on the timestep) and `maps` (everything in one
call).

Docstrings mark content of the paper as [known], and choices of this project as [ours].
"""

from focusdpo_jax.focus import (
    buckets,
    complexity,
    confidence,
    correspondence,
    grids,
    losses,
    maps,
    weighting,
)
from focusdpo_jax.focus.buckets import (
    Bucket,
    BucketParams,
    BucketStructure,
    bucket_for_step,
    make_buckets,
    sample_timesteps,
)
from focusdpo_jax.focus.complexity import local_entropy
from focusdpo_jax.focus.confidence import uncertainty
from focusdpo_jax.focus.correspondence import (
    Match,
    match,
    patch_quality,
    prototype_similarity,
    subject_and_background_prototypes,
)
from focusdpo_jax.focus.grids import average_to_grid, nearest_on_grid, share_on_grid
from focusdpo_jax.focus.losses import (
    anchor,
    diffusion_dpo,
    error_map,
    patch_dpo,
    preference_slope,
    scale_gradient,
    sft,
    weighted_mean,
    winner_preserving_scale,
)
from focusdpo_jax.focus.maps import FocusMap, focus_map
from focusdpo_jax.focus.weighting import (
    focus_weights,
    prior_weights,
    quality_weights,
    uniform_weights,
)
