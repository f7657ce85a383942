"""Scorers: compute metrics of generated images and their scenes."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Float32

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.data.images import read_image
from focusdpo_jax.evaluation.scenes import BenchmarkScene
from focusdpo_jax.vision import regions as subject_regions
from focusdpo_jax.vision.encoders import TextEncoder, VisionEncoder

Scores = dict[str, Any]
"""{metric: a value, or a list with a value per subject}; None where a metric is not defined."""

Regions = Sequence[Sequence[subject_regions.Region | None]]
"""For each scene, the region of each of its subjects, or None."""


class Scorer(Protocol):
    """Computes metrics of images.

    Attributes:
      name: changes with everything that the scores depend on; part of the names of score files.
    """

    name: str

    def score(
        self,
        scenes: Sequence[BenchmarkScene],
        images: Sequence[RGBImage],
        regions: Regions,
    ) -> list[Scores]:
        """Returns the scores of each image.

        Args:
          scenes: the scene of each image.
          images: uint8 [H, W, 3] each.
          regions: regions of the subjects in each image.
        """
        ...


class PhotographEmbeddings:
    """Cached embeddings of photographs and of their subjects, each by its own encoder."""

    def __init__(self, encoder: VisionEncoder, subject_encoder: VisionEncoder):
        self._encoder, self._subject_encoder = encoder, subject_encoder
        self._whole, self._subjects = {}, {}

    def whole(self, paths: Sequence[str]) -> Float32[np.ndarray, "N ..."]:
        """Returns unit vectors [len(paths), ...] of whole photographs."""
        return self._encoded(
            self._encoder, self._whole, paths, lambda path: read_photograph(path)[0]
        )

    def subjects(self, paths: Sequence[str]) -> Float32[np.ndarray, "N ..."]:
        """Returns unit vectors [len(paths), ...] of the subjects, cut out by masks if available."""
        return self._encoded(
            self._subject_encoder,
            self._subjects,
            paths,
            lambda path: subject_regions.crop_subject(*read_photograph(path)),
        )

    def _encoded(
        self,
        encoder: VisionEncoder,
        known: dict[str, np.ndarray],
        paths: Sequence[str],
        read: Callable[[str], RGBImage],
    ) -> np.ndarray:
        missing = [path for path in dict.fromkeys(paths) if path not in known]
        if missing:
            known |= zip(missing, encoder([read(path) for path in missing]))
        return np.stack([known[path] for path in paths])


class SimilarityScorer:
    """Similarity of images with the photographs of their subjects, by one network.

    Metrics, with `x` the network's name:
      x: mean cosine of the image with the photographs, averaged over subjects.
      x_crop: in scenes of several subjects, for each subject with a region: mean cosine of the
        region with the subject's photographs, all cut out by their masks if there are any.
      x_leakage: for each of these, the largest mean cosine with another subject's photographs minus
        x_crop. Above 0 the region resembles the other subject more.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        subject_encoder: VisionEncoder | None = None,
        needs: str | None = None,
    ):
        """Initialises it with encoders of images and cut-outs, and the region source's name."""
        self._encoder, self._subject_encoder = encoder, subject_encoder or encoder
        digests = [encoder.digest, self._subject_encoder.digest, needs]
        self.name = f"{encoder.name}-{_short(digests)}"
        self._photographs = PhotographEmbeddings(encoder, self._subject_encoder)

    def score(
        self, scenes: Sequence[BenchmarkScene], images: Sequence[RGBImage], regions: Regions
    ) -> list[Scores]:
        """Scores images; see `Scorer.score`."""
        name, values = self._encoder.name, []
        vectors = self._encoder(images)
        # A subject alone in its scene is scored by the whole image.
        regions = [row if len(scene.subjects) > 1 else [] for scene, row in zip(scenes, regions)]
        cuts = [
            subject_regions.crop_subject(image, region)
            for image, row in zip(images, regions)
            for region in row
            if region
        ]
        crops = iter(self._subject_encoder(cuts) if cuts else ())
        for scene, vector, row in zip(scenes, vectors, regions):
            own = [
                float((self._photographs.whole(s.photographs) @ vector).mean())
                for s in scene.subjects
            ]
            values.append({name: float(np.mean(own))})
            if not row:
                continue
            table = []
            for region in row:
                crop = next(crops) if region else None
                table.append(
                    region
                    and [
                        float((self._photographs.subjects(s.photographs) @ crop).mean())
                        for s in scene.subjects
                    ]
                )
            values[-1] |= {
                f"{name}_crop": [line and line[i] for i, line in enumerate(table)],
                f"{name}_leakage": [
                    line and max(x for j, x in enumerate(line) if j != i) - line[i]
                    for i, line in enumerate(table)
                ],
            }
        return values


class PromptScorer:
    """clip_t: cosine of the image and its prompt."""

    def __init__(self, encoder: VisionEncoder, encode_text: TextEncoder):
        self.name = f"clip_t-{encoder.digest}"
        self._encoder = encoder
        self._text = functools.cache(lambda prompt: encode_text([prompt])[0])

    def score(
        self, scenes: Sequence[BenchmarkScene], images: Sequence[RGBImage], regions: Regions
    ) -> list[Scores]:
        """Scores images; see `Scorer.score`."""
        vectors = self._encoder(images)
        return [
            {"clip_t": float(vector @ self._text(scene.prompt))}
            for scene, vector in zip(scenes, vectors)
        ]


class RegionScorer:
    """boxes: regions of subjects, from patch features (`regions.find_regions`); not a metric."""

    def __init__(self, encode_patches: VisionEncoder):
        self.name = f"places-{encode_patches.name}-{encode_patches.digest}"
        self._encode = encode_patches
        self._prototypes = {}

    def _prototype(self, paths: Sequence[str]) -> Float32[np.ndarray, " D"]:
        """Returns the mean patch feature of a subject's photographs, a unit vector [D]."""
        for path in paths:
            if path not in self._prototypes:
                image, region = read_photograph(path)
                self._prototypes[path] = subject_regions.subject_prototype(
                    self._encode([image])[0], region and region.mask
                )
        mean = np.mean([self._prototypes[path] for path in paths], axis=0)
        return mean / np.linalg.norm(mean)

    def score(
        self, scenes: Sequence[BenchmarkScene], images: Sequence[RGBImage], regions: Regions
    ) -> list[Scores]:
        """Returns {"boxes": [box or None per subject]} for each image; see `Scorer.score`."""
        return [
            {
                "boxes": subject_regions.find_regions(
                    features, [self._prototype(s.photographs) for s in scene.subjects]
                )
            }
            for scene, features in zip(scenes, self._encode(images))
        ]


class MissingScorer:
    """missing: in scenes of several subjects, 1 for each subject without a region, otherwise 0.

    The similarities of subjects exclude missing subjects and must be read together with this
    metric.
    """

    def __init__(self, needs: str | None):
        """Takes the name of the source of regions."""
        self.name = f"missing-{_short([needs])}"

    def score(
        self, scenes: Sequence[BenchmarkScene], images: Sequence[RGBImage], regions: Regions
    ) -> list[Scores]:
        """Scores images; see `Scorer.score`."""
        return [
            {"missing": [float(region is None) for region in row]}
            if len(scene.subjects) > 1
            else {}
            for scene, row in zip(scenes, regions)
        ]


def read_photograph(path: epath.PathLike) -> tuple[RGBImage, subject_regions.Region | None]:
    """Reads a photograph and its subject's `Region`, which is None without a mask beside it."""
    path = epath.Path(path)
    image = read_image(path)
    return image, subject_regions.photograph_region(path, image)


def _short(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
