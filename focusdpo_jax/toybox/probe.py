"""A network that reads the attributes of Toybox subjects from a generated or rendered image.

It predicts at every cell of a grid which class is there, and the attributes of that subject. The
reading of a subject is the average over the cells of its class, so at most one subject of a class
can be read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from focusdpo_jax import toybox
from focusdpo_jax.models import layers


@dataclasses.dataclass(frozen=True)
class AttributeSpace:
    """The number of values of each attribute; hues are continuous."""

    classes: int
    patterns: int
    parts: int
    backgrounds: int


TOYBOX = AttributeSpace(
    classes=len(toybox.CLASSES),
    patterns=len(toybox.PATTERNS),
    parts=len(toybox.PARTS),
    backgrounds=len(toybox.BACKGROUNDS),
)


@flax.struct.dataclass
class AttributeMaps:
    """Predictions at each cell of a g x g grid, for B images.

    Attributes:
      class_logits: [B, g, g, classes + 1]; the last is "no subject".
      hue, pattern_hue: [B, g, g, 2], the hue as (cos, sin) on its circle, not normalised.
      pattern_logits: [B, g, g, patterns].
      part_logits: [B, g, g, parts].
      background_logits: [B, backgrounds], of the whole image.
    """

    class_logits: Float[Array, "B g g classes_and_none"]
    hue: Float[Array, "B g g 2"]
    pattern_hue: Float[Array, "B g g 2"]
    pattern_logits: Float[Array, "B g g patterns"]
    part_logits: Float[Array, "B g g parts"]
    background_logits: Float[Array, "B backgrounds"]


class AttributeHeads(nn.Module):
    """Linear heads for every attribute on a grid of features."""

    space: AttributeSpace

    @nn.compact
    def __call__(self, features: Float[Array, "B g g D"]) -> AttributeMaps:
        """Maps features [B, g, g, D] to AttributeMaps."""
        space = self.space
        return AttributeMaps(
            class_logits=nn.Dense(space.classes + 1, name="class")(features),
            hue=nn.Dense(2, name="hue")(features),
            pattern_hue=nn.Dense(2, name="pattern_hue")(features),
            pattern_logits=nn.Dense(space.patterns, name="pattern")(features),
            part_logits=nn.Dense(space.parts, name="part")(features),
            background_logits=nn.Dense(space.backgrounds, name="background")(features.mean((1, 2))),
        )


class Probe(nn.Module):
    """A small convolutional network with a stride of four pixels.

    A cell sees 25 x 25 cells: even a subject that fills the image is seen as a whole.
    """

    space: AttributeSpace
    width: int = 48
    dilations: tuple[int, ...] = (1, 2, 4, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> AttributeMaps:
        """Maps [B, H, W, 3] in [0, 1] to AttributeMaps on an H/4 x W/4 grid."""
        x = pixels * 2 - 1
        x = nn.silu(nn.Conv(self.width // 2, (4, 4), (2, 2), name="stem_0")(x))
        x = nn.Conv(self.width, (4, 4), (2, 2), name="stem_1")(x)
        for i, dilation in enumerate(self.dilations):
            h = nn.silu(layers.GroupNorm(8, name=f"norm_{i}_0")(x))
            h = layers.Conv(self.width, dtype=self.dtype, name=f"conv_{i}_0")(h)
            h = nn.silu(layers.GroupNorm(8, name=f"norm_{i}_1")(h))
            h = nn.Conv(self.width, (3, 3), kernel_dilation=dilation, name=f"conv_{i}_1")(h)
            x = x + h
        return AttributeHeads(self.space, name="heads")(
            nn.silu(layers.GroupNorm(8, name="norm")(x))
        )


def hue_vector(hue: Float[Array, "..."]) -> Float[Array, "... 2"]:
    """Maps a hue in [0, 1) to (cos, sin): [...] to [..., 2]."""
    angle = 2 * jnp.pi * hue
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def attribute_loss(
    maps: AttributeMaps,
    truth: Mapping[str, Array],
    masks: Bool[Array, "B S H W"],
    present: Bool[Array, "B S"],
    background: Int[Array, " B"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the loss of predicted attributes against the ground truth.

    Args:
      maps: AttributeMaps on a g x g grid.
      truth: dict of [B, S] arrays: class_id, hue, pattern, pattern_hue, part.
      masks: [B, S, H, W], each subject's pixels; H and W are multiples of g.
      present: bool [B, S].
      background: int [B].

    Returns:
      The loss, a scalar: the sum of cross-entropies and squared errors, each averaged over the
      cells that subjects cover (the class over all cells), and a dict of its terms.
    """
    grid = maps.class_logits.shape[1]
    batch, slots, height, width = masks.shape
    coverage = masks.reshape(batch, slots, grid, height // grid, grid, width // grid)
    coverage = coverage.astype(jnp.float32).mean((3, 5)) * present[:, :, None, None]
    coverage = coverage / jnp.maximum(coverage.sum(1, keepdims=True), 1.0)

    classes = maps.class_logits.shape[-1] - 1
    labels = jnp.einsum("bshw,bsc->bhwc", coverage, jax.nn.one_hot(truth["class_id"], classes + 1))
    labels = labels.at[..., -1].add(1.0 - coverage.sum(1))
    losses = {"class": optax.softmax_cross_entropy(maps.class_logits, labels).mean()}

    def over_subjects(values: Array, weights: Array | float = 1.0) -> Array:
        """Averages [B, S, g, g] over the cells that subjects cover."""
        weight = coverage * weights
        return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-6)

    def cross_entropy(logits, values):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, None], jnp.broadcast_to(values[:, :, None, None], coverage.shape)
        )

    def squared_error(vectors, hue):
        return jnp.square(vectors[:, None] - hue_vector(hue)[:, :, None, None]).sum(-1)

    patterned = (truth["pattern"] > 0)[:, :, None, None]  # A plain subject has no second hue.
    losses["hue"] = over_subjects(squared_error(maps.hue, truth["hue"]))
    losses["pattern"] = over_subjects(cross_entropy(maps.pattern_logits, truth["pattern"]))
    losses["pattern_hue"] = over_subjects(
        squared_error(maps.pattern_hue, truth["pattern_hue"]), patterned
    )
    losses["part"] = over_subjects(cross_entropy(maps.part_logits, truth["part"]))
    losses["background"] = optax.softmax_cross_entropy_with_integer_labels(
        maps.background_logits, background
    ).mean()
    return cast(Array, sum(losses.values())), losses


@flax.struct.dataclass
class Readings:
    """The attributes read from B images, by class.

    Attributes:
      area: [B, classes], fraction of the image that the class covers.
      cells: int [B, g, g], the class at each cell, -1 for none.
      hue, pattern_hue: [B, classes] in [0, 1).
      pattern, part: int [B, classes].
      background: int [B].
    """

    area: Float[Array, "B classes"]
    cells: Int[Array, "B g g"]
    hue: Float[Array, "B classes"]
    pattern_hue: Float[Array, "B classes"]
    pattern: Int[Array, "B classes"]
    part: Int[Array, "B classes"]
    background: Int[Array, " B"]


def read(maps: AttributeMaps) -> Readings:
    """Reduces AttributeMaps to Readings: averages over each class's cells by probability."""
    certainty = jax.nn.softmax(maps.class_logits)[..., :-1]
    certainty = jnp.where(certainty > 0.5, certainty, 0.0)  # A cell counts for one class or none.
    area = certainty.mean((1, 2))

    def vote(values):
        total = jnp.einsum("bhwc,bhwk->bck", certainty, values)
        return total / jnp.maximum(certainty.sum((1, 2))[..., None], 1e-6)

    def angle(vectors):
        voted = vote(vectors)
        return (jnp.arctan2(voted[..., 1], voted[..., 0]) / (2 * jnp.pi)) % 1.0

    return Readings(
        area=area,
        cells=jnp.where(certainty.any(-1), certainty.argmax(-1), -1),
        hue=angle(maps.hue),
        pattern_hue=angle(maps.pattern_hue),
        pattern=vote(jax.nn.log_softmax(maps.pattern_logits)).argmax(-1),
        part=vote(jax.nn.log_softmax(maps.part_logits)).argmax(-1),
        background=maps.background_logits.argmax(-1),
    )
