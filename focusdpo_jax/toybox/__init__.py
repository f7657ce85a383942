"""Toybox: a procedural world of subjects with known attributes, for training and evaluation.

`subjects` samples individuals, `rendering` renders them, and `World` arranges scenes as preference
records. `probe` predicts the attributes from an image, `metrics` compares them with the ground
truth, and `pretraining` has the losses that train Toybox's encoders and probe. `probe` and
`pretraining` require JAX; the other modules require only NumPy.
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
