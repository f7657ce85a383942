"""Toybox: a procedural world of subjects with exactly known looks, for training and measuring.

`subjects` draws individuals, `rendering` paints them, `World` arranges scenes as preference records. `probe`
reads the looks off an image, `metrics` counts what is right, and `pretraining` has the losses that train
Toybox's own encoders and probe; these need JAX, the rest numpy alone.
"""

from focusdpo_jax.toybox.rendering import bounding_box, render_reference, render_subject
from focusdpo_jax.toybox.subjects import (
    ATTRIBUTES,
    CLASSES,
    HUE_BINS,
    LOOKS,
    MIN_NEIGHBOUR_CONTRAST,
    MIN_PATTERN_CONTRAST,
    PARTS,
    PATTERNS,
    VISIBLE_HUE_DIFFERENCE,
    Pose,
    Subject,
    cell,
    changed_looks,
    disrupt,
    hue_distance,
    leaked_looks,
    sample_subject,
    sample_subjects,
    split_of,
    visibly_different,
)
from focusdpo_jax.toybox.world import (
    BACKGROUNDS,
    PRIOR_MASKS,
    SPLITS,
    World,
    caption,
    contact_sheet,
    vocabulary,
)
