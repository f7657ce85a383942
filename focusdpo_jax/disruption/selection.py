"""Selects the rejected image among inpainted candidates: another individual of the same class.

The paper requires "low instance consistency, high semantic alignment". The similarities and their
combination are [ours].
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.inference.sampler import SamplingModel
from focusdpo_jax.vision import encoders, regions
from focusdpo_jax.vision.preprocess import Preprocessing

DROPPED = 0.25
"""Fraction of the candidates that is dropped, those most similar to the subject."""


def patch_encoder(model: SamplingModel, batch_size: int) -> encoders.VisionEncoder:
    """Wraps the generator's image encoder as a `VisionEncoder` of patch features, [N, P, D].

    Patch features, since pooled features describe the class more than the individual.
    """
    size = model.generator.config.image_encoder.image_size

    @jax.jit
    def apply(parameters, pixels):
        features = (
            model.generator.encode_image(parameters, pixels).penultimate[:, 1:].astype(jnp.float32)
        )
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    parameters = {"image_encoder": model.parameters["image_encoder"]}
    settings = Preprocessing((size, size), None, mean=(0.0, 0.0, 0.0), deviation=(1.0, 1.0, 1.0))
    return encoders.VisionEncoder(
        "image_encoder", apply, parameters, settings, encoders.digest_of(parameters), batch_size
    )


class CandidateScorer:
    """Scores candidates by their similarity to the replaced subject and to their phrase.

    Attributes:
      name: {score: identifier of everything that the score depends on besides the generator}.
    """

    def __init__(
        self,
        encode: encoders.VisionEncoder,
        clip: tuple[encoders.VisionEncoder, encoders.TextEncoder] | None = None,
    ):
        """Takes an encoder of cut-outs, and optionally CLIP's encoders of images and prompts.

        Without CLIP the phrase score is the generator's.
        """
        self._encode, self._clip = encode, clip
        self.name = {
            "instance_similarity": f"{encode.name} {encode.digest}",
            "caption_similarity": f"clip {clip[0].digest}" if clip else "denoising",
        }

    def scores(
        self,
        original: RGBImage,
        candidates: Sequence[RGBImage],
        mask: Mask,
        phrase: str,
        phrase_scores: Float[np.ndarray, " K"],
    ) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """Scores candidates.

        Args:
          original: uint8 [H, W, 3], the image with the subject.
          candidates: list of images of the same size, with another subject in its place.
          mask: bool [H, W], of the subject.
          phrase: phrase that the candidates should match.
          phrase_scores: float [K], by the generator (`inpainting.make_phrase_score`).

        Returns:
          instance_similarity: float [K], cosine with the original subject, averaged over patches if
            the encoder returns patches.
          caption_similarity: float [K], CLIP's cosine with the phrase, or `phrase_scores`.
        """
        region = regions.Region.from_mask(mask)
        cuts = [regions.crop_subject(image, region) for image in (original, *candidates)]
        first, *others = self._encode(cuts)
        similarity = np.array([(first * other).sum(-1).mean() for other in others])
        if self._clip is None:
            return similarity, np.asarray(phrase_scores)
        image, text = self._clip
        return similarity, image(cuts[1:]) @ text([phrase])[0]


def select_candidate(instance_similarity: ArrayLike, caption_similarity: ArrayLike) -> int:
    """Returns the index of the candidate to use.

    The fraction DROPPED of the candidates that are most similar to the subject is dropped, rounded
    down (none of fewer than four). Of the others, the one that matches its phrase best is returned.

    Args:
      instance_similarity, caption_similarity: [K], on any scale.
    """
    similarity = np.asarray(instance_similarity)
    left = len(similarity) - math.floor(DROPPED * len(similarity))
    least = np.argsort(similarity, kind="stable")[:left]
    return int(least[np.argmax(np.asarray(caption_similarity)[least])])
