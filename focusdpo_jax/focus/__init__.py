"""FocusDPO (arXiv 2509.01181): arrays in, arrays out. Needs jax, numpy and jaxtyping alone.

In another trainer, with images in [0, 1], latents of h x w and any frozen vision model's patch features:

    import focusdpo_jax as fd

    def loss_fn(params, batch, t, noise):                    # t [B], shared by the images of a pair
        maps = fd.focus.focus_map(
            batch.images, batch.prior_mask, grid=(h, w), timesteps=t,     # images [B, 2, H, W, 3]
            image_features=batch.features, reference_features=batch.reference_features,
            reference_masks=batch.reference_masks, subject_masks=batch.masks,
        )
        policy, reference = error_maps(params, t, noise), error_maps(initial_params, t, noise)
        loss, _ = fd.focus.diffusion_dpo(                    # error maps [B, 2, h, w]: (chosen, rejected)
            policy[:, 0], reference[:, 0], policy[:, 1], reference[:, 1],
            maps.weights[:, 0], maps.weights[:, 1], beta=2000.0,
        )
        return loss.mean()

`examples/focus_in_your_trainer.ipynb` is a whole training step. To read the method, begin with `losses`
(Diffusion-DPO under a weight map), then `correspondence` (SPAF: which part of the image already matches a
reference), `complexity` (DPCE: where there is detail), `weighting` (the map itself), `buckets` (how it all
moves with the timestep) and `maps` (all of it in one call).

Docstrings mark what the paper shows as [known] and what is this project's reading as [ours].
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
