"""Reliability of the subject measures, on photographs in place of generated images.

    python -m experiments.real_photographs DREAMBENCH DINOV2

DREAMBENCH is a folder in DreamBench's layout with a NN_mask.png beside every photograph, DINOV2 a
folder with trained weights in transformers' layout. Three questions are measured:

1. Is a photograph more similar to its subject's other photographs than to those of other subjects?
   Share of photographs, compared with the mean of all other subjects and with the nearest of them,
   for whole photographs and for cropped subjects. Cropped subjects are also measured on each half
   of the subjects, since the layer of their features was selected on the first half.
2. In composites of two cut-out subjects with known regions, is leakage negative for the correct
   regions and positive for swapped ones? Share of composites in which both subjects pass. A third
   of the composites shows two subjects of one class.
3. In the same composites, are the regions found when they are not given? Share of regions whose
   overlap with the correct one is at least one half, and leakage again.
"""

import itertools
import sys

import numpy as np
from etils import epath
from PIL import Image

from focusdpo_jax.data.images import read_image
from focusdpo_jax.evaluation import dreambench, scoring
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.vision import encoders
from focusdpo_jax.vision import regions as subject_regions

SIDE, HEIGHT = 512, 230  # Side of a composite, and longer side of a subject in it, in pixels.


def main(folder: str, weights: str, pairs: int = 60) -> None:
    """Prints the measured shares."""
    whole, subject, patches = encoders.load_dino("dinov2", weights, batch_size=4)
    subject = CachingEncoder(subject)
    photos = {
        path.name: sorted(path.glob("*.jpg"))
        for path in sorted(epath.Path(folder).iterdir())
        if path.is_dir()
    }
    compare_subjects(whole, subject, photos)
    composites(subject, patches, folder, photos, pairs)


class CachingEncoder:
    """Encodes each image once, since the questions share most of their images."""

    def __init__(self, encoder) -> None:
        self.name, self.digest = encoder.name, encoder.digest
        self._encoder, self._cache = encoder, {}

    def __call__(self, images):
        """Returns the features of images, stacked."""
        keys = [(image.shape, image.tobytes()) for image in images]
        new = {key: p for key, p in zip(keys, images) if key not in self._cache}
        if new:
            self._cache |= zip(new, self._encoder(list(new.values())))
        return np.stack([self._cache[key] for key in keys])


def compare_subjects(whole, subject, photos) -> None:
    """Question 1: similarity within and between subjects."""
    names = np.array([name for name, paths in photos.items() for _ in paths])
    images = [(path, read_image(path)) for paths in photos.values() for path in paths]
    print_comparison("whole photographs", whole([image for _, image in images]), names)
    vectors = subject(
        [
            subject_regions.crop_subject(image, subject_regions.photograph_region(path, image))
            for path, image in images
        ]
    )
    print_comparison("subjects cut out", vectors, names)
    half = np.isin(names, list(photos)[: len(photos) // 2])
    for kind, chosen in (("first", half), ("second", ~half)):
        print_comparison(f"subjects cut out, {kind} half", vectors[chosen], names[chosen])


def print_comparison(kind, vectors, names) -> None:
    """Prints how often the mean similarity to the own subject exceeds that to the others."""
    similarity = vectors @ vectors.T
    subjects, passed = list(dict.fromkeys(names)), []
    for i, name in enumerate(names):
        own = similarity[i, (names == name) & (np.arange(len(names)) != i)].mean()
        others = [similarity[i, names == other].mean() for other in subjects if other != name]
        passed.append((own > similarity[i, names != name].mean(), own > max(others)))
    mean, nearest = 100 * np.mean(passed, axis=0)
    print(
        f"{kind}: own subject above the mean of the others for {mean:.1f} % of {len(names)}, "
        f"above the nearest of them for {nearest:.1f} %",
        flush=True,
    )


def composites(encoder, patches, folder: str, photos, count: int) -> None:
    """Questions 2 and 3: leakage and regions in composites of two subjects."""
    table = (epath.Path(folder) / "prompts_and_classes.txt").read_text()
    kinds = dreambench.dreambench.classes(table, photos)
    rng = np.random.default_rng(0)
    every = list(itertools.combinations(photos, 2))
    same_class = [pair for pair in every if kinds[pair[0]] == kinds[pair[1]]]
    different_class = [pair for pair in every if kinds[pair[0]] != kinds[pair[1]]]
    chosen = [same_class[i % len(same_class)] for i in range(count // 3)]
    chosen += [
        different_class[i]
        for i in rng.choice(len(different_class), count - len(chosen), replace=False)
    ]
    scenes, images, regions = [], [], []
    for number, pair in enumerate(chosen):
        # The pasted photograph is excluded from the references.
        pasted = [photos[name][rng.integers(len(photos[name]))] for name in pair]
        subjects = tuple(
            BenchmarkSubject(
                name, name, str(path), tuple(str(p) for p in photos[name] if p != path)
            )
            for name, path in zip(pair, pasted)
        )
        background = photos[list(photos)[rng.integers(len(photos))]][0]
        image, masks = paste(pasted, background)
        scenes.append(BenchmarkScene(f"{number}", "", subjects, 0, "+".join(pair)))
        images.append(image)
        regions.append([subject_regions.Region.from_mask(mask) for mask in masks])
    boxes = [[subject_regions.Region(p.box) for p in row] for row in regions]
    scorer = scoring.SimilarityScorer(encoder)
    same = np.array([kinds[a] == kinds[b] for a, b in chosen])
    for kind, given in (("masks given", regions), ("boxes given", boxes)):
        correct = leakage(scorer, scenes, images, given)
        swapped = leakage(scorer, scenes, images, [row[::-1] for row in given])
        print(
            f"leakage, {kind}: {shares('negative for correct', (correct < 0).all(1), same)}; "
            f"{shares('positive for swapped', (swapped > 0).all(1), same)}; "
            f"mean {np.nanmean(correct):+.3f} and {np.nanmean(swapped):+.3f}",
            flush=True,
        )
    located = [
        [box and subject_regions.Region(tuple(box)) for box in score["boxes"]]
        for score in scoring.RegionScorer(patches).score(scenes, images, None)  # pyright: ignore[reportArgumentType]
    ]
    overlaps = np.array(
        [
            0.0 if a is None else overlap(a.box, b.box)
            for rows in zip(located, regions)
            for a, b in zip(*rows)
        ]
    )
    print(
        f"places found: {100 * (overlaps >= 0.5).mean():.1f} % of {len(overlaps)} overlap the "
        f"correct one by half or more, mean overlap {overlaps.mean():.2f}"
    )
    correct = leakage(scorer, scenes, images, located)
    print(
        f"leakage, places found: {shares('negative for correct', (correct < 0).all(1), same)}; "
        f"mean {np.nanmean(correct):+.3f}"
    )


def leakage(scorer, scenes, images, regions):
    """Leakage [scenes, 2], NaN for subjects without a region."""
    scores = scorer.score(scenes, images, regions)
    return np.array([score["dinov2_leakage"] for score in scores], np.float64)


def shares(what, passed, same) -> str:
    """Formats the share of all composites that pass, and of those of one class."""
    return (
        f"{what} {100 * passed.mean():.1f} % of {len(passed)} "
        f"({100 * passed[same].mean():.1f} % of {same.sum()} of one class)"
    )


def paste(paths, background):
    """Pastes two subjects side by side on a blurred photograph.

    Returns:
      Image uint8 [512, 512, 3], and the masks of the subjects, a list of bool [512, 512].
    """
    canvas = read_image(background)
    canvas = Image.fromarray(canvas).resize((16, 16)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas, masks = np.array(canvas), []
    for i, path in enumerate(paths):
        image = read_image(path)
        place = subject_regions.photograph_region(path, image)
        if place is None or place.mask is None:
            raise SystemExit(f"{path}: no subject found")
        rows, columns = np.nonzero(place.mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        scale = HEIGHT / max(box[2] - box[0], box[3] - box[1])
        size = [max(1, round(scale * side)) for side in (box[2] - box[0], box[3] - box[1])]
        subject = np.asarray(Image.fromarray(image).crop(box).resize(size))
        mask = np.asarray(Image.fromarray(place.mask).crop(box).resize(size))
        left, top = SIDE // 4 * (1 + 2 * i) - size[0] // 2, SIDE - 60 - size[1]
        whole = np.zeros((SIDE, SIDE), bool)
        whole[top : top + size[1], left : left + size[0]] = mask
        canvas[whole] = subject[mask]
        masks.append(whole)
    return canvas, masks


def overlap(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return shared / (sum(areas) - shared)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
