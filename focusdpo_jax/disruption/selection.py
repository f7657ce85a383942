"""Which of several candidates becomes the rejected image: another individual of the same kind.

The paper asks for "low instance consistency, high semantic alignment". How it is measured and
weighed is [ours].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.vision import encoders, regions
from focusdpo_jax.vision.preprocess import Preprocessing

DROPPED = 0.25
"""Share of the candidates that is dropped for resembling the subject most."""


def patch_encoder(model, batch_size):
    """The generator's image encoder as a `VisionEncoder` of patches, [N, P, D].

    Patches, since what is pooled says more of the kind than of the individual.
    """
    size = model.generator.config.image_encoder.image_size

    @jax.jit
    def apply(parameters, pixels):
        features = (
            model.generator.encode_image(parameters, pixels).penultimate[:, 1:].astype(jnp.float32)
        )
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    parameters = {"image_encoder": model.parameters["image_encoder"]}
    settings = Preprocessing((size, size), None, mean=(0.0,) * 3, deviation=(1.0,) * 3)
    return encoders.VisionEncoder(
        "image_encoder", apply, parameters, settings, encoders.digest_of(parameters), batch_size
    )


class CandidateScorer:
    """Scores candidates: like the subject that they replace, and like what they are to show.

    Attributes:
      name: changes with all that the scores depend on besides the generator.
    """

    def __init__(self, encode, clip=None):
        """Takes an encoder of cut-outs, and CLIP's (encoder of images, encoder of prompts).

        Without CLIP the phrase's fit is left to the generator.
        """
        self._encode, self._clip = encode, clip
        self.name = {
            "instance_similarity": f"{encode.name} {encode.digest}",
            "caption_similarity": f"clip {clip[0].digest}" if clip else "denoising",
        }

    def scores(self, original, candidates, mask, phrase, phrase_scores):
        """What there is to choose by.

        Args:
          original: uint8 [H, W, 3], with the subject.
          candidates: list of the same, with others in its region.
          mask: bool [H, W], the region.
          phrase: what each shall show.
          phrase_scores: float [K], by the generator (`inpainting.make_phrase_score`).

        Returns:
          instance_similarity: float [K], cosine with the subject, patch by patch where the encoder
          has patches; caption_similarity: float [K], CLIP's cosine with the phrase, or `phrase_scores`.
        """
        region = regions.Region.from_mask(mask)
        cuts = [regions.crop_subject(image, region) for image in (original, *candidates)]
        first, *others = self._encode(cuts)
        similarity = np.array([(first * other).sum(-1).mean() for other in others])
        if self._clip is None:
            return similarity, np.asarray(phrase_scores)
        image, text = self._clip
        return similarity, image(cuts[1:]) @ text([phrase])[0]


def select_candidate(instance_similarity, caption_similarity):
    """Index of the candidate to take.

    The quarter that resembles the subject most is dropped (none of fewer than four); of the others
    the one that fits its phrase best is taken.

    Args:
      instance_similarity, caption_similarity: [K], of any scale.
    """
    left = len(instance_similarity) - math.floor(DROPPED * len(instance_similarity))
    least = np.argsort(np.asarray(instance_similarity), kind="stable")[:left]
    return int(least[np.argmax(np.asarray(caption_similarity)[least])])
