"""Scorers: from images and the scenes that they should show to the values of measures.

A scorer has a `name`, which changes with all that its values depend on, and `score(scenes,
images, regions)`: a list with, for each image, {measure: value, or a list with a value a
subject}; None where a measure is not defined.
"""

import functools
import hashlib
import json

import numpy as np
from etils import epath

from focusdpo_jax.data.images import read_image
from focusdpo_jax.vision import regions as subject_regions


class PhotographEmbeddings:
    """Photographs as one encoder sees them, and their subjects as another, each encoded once."""

    def __init__(self, encoder, subject_encoder):
        self._encoder, self._subject_encoder = encoder, subject_encoder
        self._whole, self._subjects = {}, {}

    def whole(self, paths):
        """Unit vectors [len(paths), ...] of whole photographs."""
        return self._encoded(
            self._encoder, self._whole, paths, lambda path: read_photograph(path)[0]
        )

    def subjects(self, paths):
        """The same of their subjects alone, where there are masks to cut them out by."""
        return self._encoded(
            self._subject_encoder,
            self._subjects,
            paths,
            lambda path: subject_regions.crop_subject(*read_photograph(path)),
        )

    def _encoded(self, encoder, known, paths, read):
        missing = [path for path in dict.fromkeys(paths) if path not in known]
        if missing:
            known |= zip(missing, encoder([read(path) for path in missing]))
        return np.stack([known[path] for path in paths])


class SimilarityScorer:
    """How much images resemble the photographs of their subjects, by one network.

    With `x` the network's name:
      x: mean cosine of the image with the photographs, averaged over subjects.
      x_crop: in scenes of several, for each subject that has a region: mean cosine of what stands
        there with the subject's photographs, all cut out as far as masks are there.
      x_leakage: for each of them, the same cosine with another subject's photographs minus that
        with its own, of the other that is nearest. Above 0 it looks more like the other.
    """

    def __init__(self, encoder, subject_encoder=None, needs=None):
        """Takes encoders of whole images and of cut-outs, and what the regions depend on."""
        self._encoder, self._subject_encoder = encoder, subject_encoder or encoder
        digests = [encoder.digest, self._subject_encoder.digest, needs]
        self.name = f"{encoder.name}-{_short(digests)}"
        self._photographs = PhotographEmbeddings(encoder, self._subject_encoder)

    def score(self, scenes, images, regions):
        """See the module; `regions` has a list of Region or None for each scene's subjects."""
        name, values = self._encoder.name, []
        vectors = self._encoder(images)
        # Of a subject that is alone in its scene the whole image speaks.
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

    def __init__(self, encoder, encode_text):
        self.name = f"clip_t-{encoder.digest}"
        self._encoder = encoder
        self._text = functools.cache(lambda prompt: encode_text([prompt])[0])

    def score(self, scenes, images, regions):
        """See the module."""
        vectors = self._encoder(images)
        return [
            {"clip_t": float(vector @ self._text(scene.prompt))}
            for scene, vector in zip(scenes, vectors)
        ]


class RegionScorer:
    """boxes: where subjects stand, found by patch features (`regions.find_regions`); no measure."""

    def __init__(self, encode_patches):
        self.name = f"places-{encode_patches.name}-{encode_patches.digest}"
        self._encode = encode_patches
        self._prototypes = {}

    def _prototype(self, paths):
        """Unit vector of what a subject's photographs have in common."""
        for path in paths:
            if path not in self._prototypes:
                image, region = read_photograph(path)
                self._prototypes[path] = subject_regions.subject_prototype(
                    self._encode([image])[0], region and region.mask
                )
        mean = np.mean([self._prototypes[path] for path in paths], axis=0)
        return mean / np.linalg.norm(mean)

    def score(self, scenes, images, regions):
        """See the module."""
        return [
            {
                "boxes": subject_regions.find_regions(
                    features, [self._prototype(s.photographs) for s in scene.subjects]
                )
            }
            for scene, features in zip(scenes, self._encode(images))
        ]


class MissingScorer:
    """missing: in scenes of several, 1 for each subject that has no region, otherwise 0.

    The similarities of subjects leave these out, so that they say nothing alone.
    """

    def __init__(self, needs):
        """`needs` names what the regions depend on."""
        self.name = f"missing-{_short([needs])}"

    def score(self, scenes, images, regions):
        """See the module."""
        return [
            {"missing": [float(region is None) for region in row]}
            if len(scene.subjects) > 1
            else {}
            for scene, row in zip(scenes, regions)
        ]


def read_photograph(path):
    """The image of a file and its subject's `Region`, None without a mask beside it."""
    path = epath.Path(path)
    image = read_image(path)
    return image, subject_regions.photograph_region(path, image)


def _short(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
