"""DINO, DINOv2 and CLIP encoders, as DreamBench uses them: images and prompts to unit vectors."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.checkpoints import clip as clip_folder
from focusdpo_jax.checkpoints import dino as dino_folder
from focusdpo_jax.sharding.mesh import inference_mesh, replicate, shard_batch
from focusdpo_jax.vision import preprocess

if TYPE_CHECKING:
    from focusdpo_jax.models.tokenizer import Tokenizer

# Patch features that distinguish individuals best (experiments/real_photographs.py): the layer, as
# a fraction of the number of layers, and the side of the input image in pixels.
_PATCH_DEPTH, _PATCH_SIDE = 0.75, 448


@dataclasses.dataclass(frozen=True)
class VisionEncoder:
    """Maps images to feature vectors.

    Attributes:
      name: prefix of its metrics (`metric_names.ENCODERS`).
      apply: jitted function of parameters and pixels [B, h, w, 3] that returns [B, ...].
      parameters: parameters of `apply`, on the host.
      settings: preprocessing of the images.
      digest: changes with the parameters and the layer.
      batch_size: images of a batch, which is divided among the devices that divide it evenly.
    """

    name: str
    apply: Callable
    parameters: Any
    settings: preprocess.Preprocessing
    digest: str
    batch_size: int = 16

    @functools.cached_property
    def _placed(self) -> tuple[jax.sharding.Mesh, Any]:
        """The mesh, and the parameters replicated on its devices."""
        mesh = inference_mesh(self.batch_size)
        return mesh, replicate(self.parameters, mesh)

    def __call__(self, images: Sequence[RGBImage]) -> Float32[np.ndarray, "N ..."]:
        """Encodes N images, uint8 [H, W, 3], to unit vectors, float32 [N, ...]."""
        (mesh, parameters), vectors = self._placed, []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            pixels = np.stack([preprocess.preprocess(p, self.settings) for p in batch])
            # Padded to one shape, so that one program is compiled.
            pixels = np.pad(pixels, [(0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
            encoded = self.apply(parameters, shard_batch(pixels, mesh))
            vectors.append(np.asarray(encoded)[: len(batch)])
        return np.concatenate(vectors)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Maps prompts to CLIP's embedding space; see `VisionEncoder` for the attributes."""

    apply: Callable
    parameters: Any
    tokenize: "Tokenizer"

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Encodes N prompts; returns unit vectors, float32 [N, D]."""
        return np.concatenate(
            [
                np.asarray(self.apply(self.parameters, self.tokenize(prompt)[None, 0]))
                for prompt in prompts
            ]
        )


def load_dino(
    name: str, folder: epath.PathLike, batch_size: int = 16
) -> tuple[VisionEncoder, VisionEncoder, VisionEncoder]:
    """Loads DINO or DINOv2 from a folder in transformers' layout.

    Args:
      name: "dino" or "dinov2".
      folder: folder of the checkpoint.
      batch_size: images of a batch.

    Returns:
      Three encoders. The first returns the class token of the last layer, [N, D], for the centre
      224 of 256 pixels, as the original evaluation does. The second, for cut-out subjects, returns
      that of the layer before [ours]: the last layer may have been trained to distinguish classes
      rather than individuals (experiments/real_photographs.py). The third returns the patch
      features of an earlier layer, [N, g, g, D], for the whole image.

    Raises:
      UserError: the folder cannot be read as such a model.
    """
    model: Any  # flax types `apply` as returning a tuple, whatever the module returns.
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


def load_clip(folder: epath.PathLike, batch_size: int = 16) -> tuple[VisionEncoder, TextEncoder]:
    """Loads CLIP from a folder in transformers' layout.

    Returns:
      The encoder of images and the encoder of prompts.

    Raises:
      UserError: the folder cannot be read as such a model.
    """
    clip: Any = clip_folder.load(folder)  # As `model` in `load_dino`.
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


def digest_of(tree: Any) -> str:
    """Returns a short hash of the paths, dtypes, shapes and values of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _unit(vectors: jax.Array) -> Float[Array, "N ..."]:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
