"""DINO, DINOv2 and CLIP as DreamBench uses them: pictures and prompts to unit vectors."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.checkpoints import clip as clip_folder
from focusdpo_jax.checkpoints import dino as dino_folder
from focusdpo_jax.evaluation import preprocess

# Where DINOv2 tells one individual from another best, as a share of its layers, and the side in
# pixels at which its patches are small enough for that (benchmarks/real_photographs.py).
_DEPTH, _SIDE = 0.75, 448


@dataclasses.dataclass(frozen=True)
class PictureEncoder:
    """Pictures to vectors.

    Attributes:
      name: prefix of its measures (`measures.ENCODERS`).
      apply: jitted function of parameters and [B, h, w, 3] to [B, ...].
      parameters: of `apply`.
      settings: how pictures are prepared.
      digest: changes when the parameters do.
      batch_size: pictures at once.
    """

    name: str
    apply: Callable
    parameters: Any
    settings: preprocess.Preprocessing
    digest: str
    batch_size: int = 16

    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors of length 1 along the last axis, float32 [N, ...], of uint8 [H, W, 3] each."""
        vectors = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start:start + self.batch_size]
            pixels = np.stack([preprocess.preprocess(p, self.settings) for p in batch])
            # One shape, one program.
            pixels = np.pad(pixels, [(0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
            vectors.append(np.asarray(self.apply(self.parameters, pixels))[:len(batch)])
        return np.concatenate(vectors)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Prompts to vectors in the space of CLIP's pictures; attributes as of `PictureEncoder`."""

    apply: Callable
    parameters: Any
    tokenize: Callable

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, float32 [N, D]."""
        return np.concatenate([
            np.asarray(self.apply(self.parameters, self.tokenize(prompt)[None, 0]))
            for prompt in prompts])


def load_dino(name, folder, batch_size=16):
    """DINO or DINOv2 from transformers' folder: (encoder of pictures, encoder of patches).

    The first gives the class token of the last layer [N, D] of the middle 224 of 256 pixels, as the
    original's evaluation does; the second the patches of a layer before it, [N, g, g, D], of the
    whole picture.

    Args:
      name: "dino" or "dinov2".

    Raises:
      UserError: the folder is not readable as such.
    """
    model, parameters = dino_folder.load(folder)
    layer = round(_DEPTH * model.config.num_layers)
    side = _SIDE - _SIDE % model.config.patch_size
    grid = side // model.config.patch_size
    digest = digest_of(parameters)

    @jax.jit
    def whole(parameters, pixels):
        return _unit(model.apply({"params": parameters}, pixels).pooled)

    @jax.jit
    def patches(parameters, pixels):
        states = model.apply({"params": parameters}, pixels, capture=(layer,)).captured[layer]
        return _unit(states[:, 1:].reshape(len(pixels), grid, grid, -1))

    square = dataclasses.replace(preprocess.DINO, resize=(side, side), crop=None)
    parameters = jax.device_put(parameters)
    return (PictureEncoder(name, whole, parameters, preprocess.DINO, digest, batch_size),
            PictureEncoder(name, patches, parameters, square, digest, max(1, batch_size // 4)))


def load_clip(folder, batch_size=16):
    """CLIP from transformers' folder: (encoder of pictures, encoder of prompts).

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
    return (PictureEncoder("clip_i", image, jax.device_put(clip.image_parameters), settings,
                           digest, batch_size),
            TextEncoder(text, jax.device_put(clip.text_parameters), clip.tokenizer))


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
