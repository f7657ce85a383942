"""DINO, DINOv2 and CLIP as DreamBench uses them: images and prompts to unit vectors."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.checkpoints import clip as clip_folder
from focusdpo_jax.checkpoints import dino as dino_folder
from focusdpo_jax.sharding.mesh import drawing_mesh, replicate, shard_batch
from focusdpo_jax.vision import preprocess

# The patches that tell one individual from another: of the output of which layer, as a share of
# their number, and of an image of which side in pixels (experiments/real_photographs.py).
_PATCH_DEPTH, _PATCH_SIDE = 0.75, 448


@dataclasses.dataclass(frozen=True)
class VisionEncoder:
    """Images to vectors.

    Attributes:
      name: prefix of its measures (`metric_names.ENCODERS`).
      apply: jitted function of parameters and [B, h, w, 3] to [B, ...].
      parameters: of `apply`, on the host.
      settings: how images are prepared.
      digest: changes when the parameters or the layer do.
      batch_size: images at once, divided among as many devices as share them equally.
    """

    name: str
    apply: Callable
    parameters: Any
    settings: preprocess.Preprocessing
    digest: str
    batch_size: int = 16

    @functools.cached_property
    def _placed(self):
        """The mesh, and the parameters on each of its devices."""
        mesh = drawing_mesh(self.batch_size)
        return mesh, replicate(self.parameters, mesh)

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors of length 1 along the last axis, float32 [N, ...], of uint8 [H, W, 3] each."""
        (mesh, parameters), vectors = self._placed, []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            pixels = np.stack([preprocess.preprocess(p, self.settings) for p in batch])
            # One shape, one program.
            pixels = np.pad(pixels, [(0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
            encoded = self.apply(parameters, shard_batch(pixels, mesh))
            vectors.append(np.asarray(encoded)[: len(batch)])
        return np.concatenate(vectors)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Prompts to vectors in the space of CLIP's images; attributes as of `VisionEncoder`."""

    apply: Callable
    parameters: Any
    tokenize: Callable

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, float32 [N, D]."""
        return np.concatenate(
            [
                np.asarray(self.apply(self.parameters, self.tokenize(prompt)[None, 0]))
                for prompt in prompts
            ]
        )


def load_dino(name, folder, batch_size=16):
    """DINO or DINOv2 from transformers' folder: encoders of images, of subjects and of patches.

    The first gives the class token of the last layer [N, D] of the middle 224 of 256 pixels, as the
    original's evaluation does. The second, for subjects that are cut out, gives that of the layer
    before [ours]: the last may have been trained on to tell kinds and not individuals
    (experiments/real_photographs.py). The third gives the patches of a layer before that,
    [N, g, g, D], of the whole image.

    Args:
      name: "dino" or "dinov2".

    Raises:
      UserError: the folder is not readable as such.
    """
    model, parameters = dino_folder.load(folder)
    before, inner = model.config.num_layers - 1, round(_PATCH_DEPTH * model.config.num_layers)
    side = _PATCH_SIDE - _PATCH_SIDE % model.config.patch_size
    grid = side // model.config.patch_size
    digest = digest_of(parameters)

    @jax.jit
    def whole(parameters, pixels):
        return _unit(model.apply({"params": parameters}, pixels).pooled)

    def states(parameters, pixels, layer):
        return model.apply({"params": parameters}, pixels, capture=(layer,)).captured[layer]

    @jax.jit
    def subject(parameters, pixels):
        return _unit(states(parameters, pixels, before)[:, 0])

    @jax.jit
    def patches(parameters, pixels):
        return _unit(states(parameters, pixels, inner)[:, 1:].reshape(len(pixels), grid, grid, -1))

    square = dataclasses.replace(preprocess.DINO, resize=(side, side), crop=None)
    return (
        VisionEncoder(name, whole, parameters, preprocess.DINO, digest, batch_size),
        VisionEncoder(
            name, subject, parameters, preprocess.DINO, f"{digest} layer {before}", batch_size
        ),
        VisionEncoder(name, patches, parameters, square, digest, max(1, batch_size // 4)),
    )


def load_clip(folder, batch_size=16):
    """CLIP from transformers' folder: (encoder of images, encoder of prompts).

    Raises:
      UserError: the folder is not readable as such.
    """
    clip = clip_folder.load(folder)
    side = clip.image.config.image_size
    settings = dataclasses.replace(preprocess.CLIP, resize=side, crop=(side, side))

    @jax.jit
    def image(parameters, pixels):
        return _unit(clip.image.apply({"params": parameters}, pixels).projected)

    @jax.jit
    def text(parameters, ids):
        return _unit(clip.text.apply({"params": parameters}, ids).projected)

    digest = digest_of((clip.image_parameters, clip.text_parameters))
    return (
        VisionEncoder("clip_i", image, clip.image_parameters, settings, digest, batch_size),
        TextEncoder(text, jax.device_put(clip.text_parameters), clip.tokenizer),
    )


def digest_of(tree):
    """A short text that changes when a tree of arrays does."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _unit(vectors):
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
