"""The measures of subjects on photographs, as if a generator had drawn them.

    python -m experiments.real_photographs DREAMBENCH DINOV2

DREAMBENCH is a folder in DreamBench's layout with a NN_mask.png beside every photograph, DINOV2 a
folder with trained weights in transformers' layout. Three questions:

1. Is a photograph more similar to its subject's other photographs than to those of other subjects?
   Share of photographs, against the mean of all other subjects and against the nearest of them; of
   whole photographs, and of subjects cut out, also for each half of the subjects by itself, since
   the layer that tells cut-out subjects apart was chosen on the first half.
2. Composites of two cut-out subjects on one background, a third of them of two subjects of one
   class, with their regions known: is leakage negative where each subject stands in its own place,
   and positive where the two have changed regions? Shares of composites; both subjects must pass.
3. On the same composites, without telling the regions: are the subjects found? Share of regions that
   overlap the right one by half and more, and leakage again.
"""

import itertools
import sys

import numpy as np
from etils import epath
from PIL import Image

from focusdpo_jax.data import images
from focusdpo_jax.evaluation import dreambench, scoring
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.vision import encoders
from focusdpo_jax.vision import regions as subject_regions

SIDE, HEIGHT = 512, 230  # Of a composite, and of a subject in it, in pixels.


def main(folder: str, weights: str, pairs: int = 60) -> None:
    """Prints the figures."""
    whole, subject, patches = encoders.load_dino("dinov2", weights, batch_size=4)
    subject = Remembering(subject)
    photos = {
        path.name: sorted(path.glob("*.jpg"))
        for path in sorted(epath.Path(folder).iterdir())
        if path.is_dir()
    }
    alike(whole, subject, photos)
    composites(subject, patches, folder, photos, pairs)


class Remembering:
    """An encoder that sees no picture twice: the questions share most of theirs."""

    def __init__(self, encoder) -> None:
        self.name, self.digest = encoder.name, encoder.digest
        self._encoder, self._known = encoder, {}

    def __call__(self, pictures):
        """Returns the features of images, computed once for each."""
        keys = [(picture.shape, picture.tobytes()) for picture in pictures]
        new = {key: p for key, p in zip(keys, pictures) if key not in self._known}
        if new:
            self._known |= zip(new, self._encoder(list(new.values())))
        return np.stack([self._known[key] for key in keys])


def alike(whole, subject, photos) -> None:
    """Question 1."""
    names = np.array([name for name, paths in photos.items() for _ in paths])
    pictures = [(path, images.read_image(path)) for paths in photos.values() for path in paths]
    print_alike("whole photographs", whole([picture for _, picture in pictures]), names)
    vectors = subject(
        [
            subject_regions.crop_subject(picture, subject_regions.photograph_region(path, picture))
            for path, picture in pictures
        ]
    )
    print_alike("subjects cut out", vectors, names)
    half = np.isin(names, list(photos)[: len(photos) // 2])
    for kind, chosen in (("first", half), ("second", ~half)):
        print_alike(f"subjects cut out, {kind} half", vectors[chosen], names[chosen])


def print_alike(kind, vectors, names) -> None:
    """How often the own subject's mean similarity is above the others'."""
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
    """Questions 2 and 3."""
    table = (epath.Path(folder) / "prompts_and_classes.txt").read_text()
    kinds = dreambench.dreambench.classes(table, photos)
    draw = np.random.default_rng(0)
    every = list(itertools.combinations(photos, 2))
    same_class = [pair for pair in every if kinds[pair[0]] == kinds[pair[1]]]
    unlike = [pair for pair in every if kinds[pair[0]] != kinds[pair[1]]]
    chosen = [same_class[i % len(same_class)] for i in range(count // 3)]
    chosen += [unlike[i] for i in draw.choice(len(unlike), count - len(chosen), replace=False)]
    scenes, pictures, regions = [], [], []
    for number, pair in enumerate(chosen):
        # What is pasted is not among what it is compared with.
        shown = [photos[name][draw.integers(len(photos[name]))] for name in pair]
        subjects = tuple(
            BenchmarkSubject(
                name, name, str(path), tuple(str(p) for p in photos[name] if p != path)
            )
            for name, path in zip(pair, shown)
        )
        background = photos[list(photos)[draw.integers(len(photos))]][0]
        picture, masks = paste(shown, background)
        scenes.append(BenchmarkScene(f"{number}", "", subjects, 0, "+".join(pair)))
        pictures.append(picture)
        regions.append([subject_regions.Region.from_mask(mask) for mask in masks])
    boxes = [[subject_regions.Region(p.box) for p in row] for row in regions]
    scorer = scoring.SimilarityScorer(encoder)
    same = np.array([kinds[a] == kinds[b] for a, b in chosen])
    for kind, given in (("masks given", regions), ("boxes given", boxes)):
        true = leakage(scorer, scenes, pictures, given)
        changed = leakage(scorer, scenes, pictures, [row[::-1] for row in given])
        print(
            f"leakage, {kind}: {report('negative for true', (true < 0).all(1), same)}; "
            f"{report('positive for swapped', (changed > 0).all(1), same)}; "
            f"mean {np.nanmean(true):+.3f} and {np.nanmean(changed):+.3f}",
            flush=True,
        )
    found = [
        [box and subject_regions.Region(tuple(box)) for box in score["boxes"]]
        for score in scoring.RegionScorer(patches).score(scenes, pictures, None)  # pyright: ignore[reportArgumentType]
    ]
    overlaps = np.array(
        [
            0.0 if a is None else overlap(a.box, b.box)
            for rows in zip(found, regions)
            for a, b in zip(*rows)
        ]
    )
    print(
        f"places found: {100 * (overlaps >= 0.5).mean():.1f} % of {len(overlaps)} overlap the "
        f"right one by half and more, mean overlap {overlaps.mean():.2f}"
    )
    true = leakage(scorer, scenes, pictures, found)
    print(
        f"leakage, places found: {report('negative for true', (true < 0).all(1), same)}; "
        f"mean {np.nanmean(true):+.3f}"
    )


def leakage(scorer, scenes, pictures, regions):
    """[scenes, 2], NaN where a subject has no place."""
    scores = scorer.score(scenes, pictures, regions)
    return np.array([score["dinov2_leakage"] for score in scores], np.float64)


def report(what, passed, same) -> str:
    """Shares of all composites and of those of one class."""
    return (
        f"{what} {100 * passed.mean():.1f} % of {len(passed)} "
        f"({100 * passed[same].mean():.1f} % of {same.sum()} of one class)"
    )


def paste(paths, background):
    """Two subjects side by side on a blurred photograph, and their masks."""
    canvas = images.read_image(background)
    canvas = Image.fromarray(canvas).resize((16, 16)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas, masks = np.array(canvas), []
    for i, path in enumerate(paths):
        picture = images.read_image(path)
        place = subject_regions.photograph_region(path, picture)
        if place is None or place.mask is None:
            raise SystemExit(f"{path}: no subject found")
        rows, columns = np.nonzero(place.mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        scale = HEIGHT / max(box[2] - box[0], box[3] - box[1])
        size = [max(1, round(scale * side)) for side in (box[2] - box[0], box[3] - box[1])]
        subject = np.asarray(Image.fromarray(picture).crop(box).resize(size))
        mask = np.asarray(Image.fromarray(place.mask).crop(box).resize(size))
        left, top = SIDE // 4 * (1 + 2 * i) - size[0] // 2, SIDE - 60 - size[1]
        whole = np.zeros((SIDE, SIDE), bool)
        whole[top : top + size[1], left : left + size[0]] = mask
        canvas[whole] = subject[mask]
        masks.append(whole)
    return canvas, masks


def overlap(a, b):
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return shared / (sum(areas) - shared)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
