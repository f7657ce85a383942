"""Precision of SPAF's match on real photographs, with DINOv2's features.

    python -m experiments.correspondence --data=DREAMBENCH --weights=DINOV2

`--data` is a folder with `<subject>/00.jpg`, `00_mask.png` and so on, and DreamBench's
`prompts_and_classes.txt`. `--weights` is a DINOv2 folder in transformers' layout. Images have
448 px (32 x 32 patches), and k is half of the subject's area. The settings are:

    one subject    The first photo of a subject is the reference, its other photos are the targets.
                   Measured is the share of matched patches inside the mask.
    composites     The first photos of two subjects are the references. The target is a composite of
                   cut-outs from two other photos, 200 px each, alternately on plain grey and on the
                   background of a photo of a third subject, which is inpainted. Measured is the
                   share of matched patches on the correct subject.

`inside` is the mean of this share over images, `chance` its value for patches drawn at random. Each
setting is measured with every patch of a reference as its own prototype, and with `--prototypes`
prototypes per subject (`config.focus.prototypes`). `--mean` adds one prototype per subject without
competition from the references' backgrounds.
"""

import argparse
import functools
import itertools
import pathlib
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from focusdpo_jax.checkpoints import dino
from focusdpo_jax.focus import correspondence
from focusdpo_jax.vision import preprocess

SIDE, PATCH, OBJECT = 448, 14, 200  # Pixels.
GRID = SIDE // PATCH
# Of ViT-S's 12 layers: later ones separate classes better, but individuals of a class worse.
LAYERS = (8, 9, 10)


class Photos:
    """The subjects of a folder, with their classes and photographs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self.classes = {}
        for line in (self.folder / "prompts_and_classes.txt").read_text().splitlines():
            subject, comma, kind = line.strip().partition(",")
            if comma and len(list(self.folder.glob(f"{subject}/??_mask.png"))) > 1:
                self.classes[subject] = kind

    def count(self, subject):
        """Number of photographs of a subject."""
        return len(list(self.folder.glob(f"{subject}/??_mask.png")))

    def read(self, subject, number):
        """Returns a photograph, uint8 [448, 448, 3], and its mask, bool [448, 448]."""
        path = self.folder / subject / f"{number:02d}.jpg"
        size = (SIDE, SIDE)
        image = Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        mask = Image.open(path.with_name(f"{number:02d}_mask.png")).convert("L")
        return np.asarray(image), np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) > 127

    def cut_out(self, subject, number):
        """Returns image and mask of the cropped subject, with a longer side of 200 px."""
        image, mask = self.read(subject, number)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        image, mask = Image.fromarray(image[box]), Image.fromarray(mask[box])
        scale = OBJECT / max(image.size)
        width, height = (max(1, round(scale * length)) for length in image.size)
        size = width, height
        mask = mask.convert("L").resize(size, Image.Resampling.BILINEAR)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC)), np.asarray(mask) > 127

    def background(self, subject, number):
        """Returns a photograph whose subject is inpainted from its surroundings."""
        image, mask = self.read(subject, number)
        mask = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15)))
        small = (SIDE // 4, SIDE // 4)
        painted = cv2.inpaint(
            cv2.resize(image, small), cv2.resize(mask, small), 5, cv2.INPAINT_TELEA
        )
        return np.where(mask[..., None] > 0, cv2.resize(painted, (SIDE, SIDE)), image)


def composite(photos, pair, rng, plain):
    """Pastes two cut-outs side by side: image uint8 [448, 448, 3] and masks bool [2, 448, 448]."""
    others = [subject for subject in photos.classes if subject not in pair]
    if plain or not others:
        image = np.full((SIDE, SIDE, 3), rng.integers(60, 200), np.uint8)
    else:
        other = others[rng.integers(len(others))]
        image = photos.background(other, int(rng.integers(photos.count(other)))).copy()
    masks = np.zeros((2, SIDE, SIDE), bool)
    for side, subject in enumerate(pair):
        # The first photo is the reference.
        cut, mask = photos.cut_out(subject, int(rng.integers(1, photos.count(subject))))
        height, width = mask.shape
        top = rng.integers(SIDE - height + 1)
        left = side * SIDE // 2 + rng.integers(SIDE // 2 - width + 1)
        image[top : top + height, left : left + width][mask] = cut[mask]
        masks[side, top : top + height, left : left + width] = mask
    return image, masks


def make_features(folder: pathlib.Path):
    """Returns a function from images, uint8 [B, 448, 448, 3], to patch features [B, 32, 32, D].

    Features of several layers are normalised to length 1 and concatenated, so that the cosine of
    two features is the mean of the cosines of the layers.
    """
    model, parameters = dino.load(folder)
    mean, deviation = np.array(preprocess.DINO.mean), np.array(preprocess.DINO.deviation)

    @jax.jit
    def features(parameters, images):
        images = (images / 255.0 - mean) / deviation
        output: Any = model.apply(
            {"params": parameters}, images.astype(jnp.float32), capture=LAYERS
        )
        captured = output.captured
        states = [
            captured[layer] / jnp.linalg.norm(captured[layer], axis=-1, keepdims=True)
            for layer in LAYERS
        ]
        states = jnp.concatenate(states, axis=-1)[:, 1:]
        return states.reshape(len(images), GRID, GRID, -1)

    return lambda images: features(parameters, jnp.asarray(images))


def patch_coverage(masks):
    """Share of each patch that masks [..., 448, 448] cover, float32 [..., 32, 32]."""
    cells = masks.reshape(*masks.shape[:-2], GRID, PATCH, GRID, PATCH)
    return cells.mean((-3, -1), dtype=np.float32)


@functools.partial(jax.jit, static_argnames="count")
def match_with_background(references, reference_masks, target, area, count: int = 0):
    """SPAF's match as computed by `focus.correspondence`, with prototypes of the backgrounds.

    Args:
      references: patch features, [S, h, w, D].
      reference_masks: coverage of patches by the subject, [S, h, w].
      target: patch features, [h, w, D].
      area: area of the subjects in the target in patches, [S].
      count: prototypes per subject; 0 uses every patch of its reference as a prototype.

    Returns:
      The match of each subject, [S, h, w].
    """
    subjects, *_, channels = references.shape
    features = references.reshape(1, subjects, -1, channels)
    masks, present = reference_masks.reshape(1, subjects, -1), jnp.ones((1, subjects), bool)
    if count:
        prototypes = correspondence.subject_and_background_prototypes(
            features, masks, present, count
        )
    else:
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        inside = masks[..., None] > 0.5
        prototypes = jnp.stack([features * inside, features * ~inside], axis=2)
    similarity, background = correspondence.prototype_similarity(prototypes, target[None])
    return correspondence.match(similarity, present, area[None], 0.5, background).subjects[0]


@jax.jit
def match_by_mean(references, reference_masks, target, area):
    """Like `match_with_background`, with one prototype per subject and no background."""
    subjects, *_, channels = references.shape
    present = jnp.ones((1, subjects), bool)
    means = correspondence.prototypes(
        references.reshape(1, subjects, -1, channels),
        reference_masks.reshape(1, subjects, -1),
        present,
    )
    similarity = correspondence.cosine_similarity(means, target[None])
    return correspondence.match(similarity, present, area[None], 0.5).subjects[0]


def inside_share(match, references, target, masks):
    """Share of matched patches on the correct subject, mean over subjects, and its chance value."""
    features, reference_masks = (np.stack(part) for part in zip(*references))
    matched = np.asarray(match(features, reference_masks, target, masks.sum((1, 2))))
    inside = (matched * masks).sum((1, 2)) / np.maximum(matched.sum((1, 2)), 1)
    return inside.mean(), masks.mean()


def measure(photos, features, count: int, seed: int, matches):
    """Yields (title, {match: [(inside, chance) per image]}) for each of the three settings."""

    def encode(image, mask):
        return np.asarray(features(image[None])[0]), patch_coverage(mask)

    references = {subject: encode(*photos.read(subject, 0)) for subject in photos.classes}
    rows = {name: [] for name in matches}
    for subject in photos.classes:
        for number in range(1, photos.count(subject)):
            target, mask = encode(*photos.read(subject, number))
            for name, match in matches.items():
                rows[name].append(inside_share(match, [references[subject]], target, mask[None]))
    yield "one subject", rows

    pairs = list(itertools.permutations(photos.classes, 2))
    for same, title in (
        (False, "two subjects of different classes"),
        (True, "two subjects of one class"),
    ):
        rng = np.random.default_rng((seed, same))
        candidates = [p for p in pairs if (photos.classes[p[0]] == photos.classes[p[1]]) == same]
        rows = {name: [] for name in matches}
        for i in range(count if candidates else 0):
            pair = candidates[rng.integers(len(candidates))]
            target, masks = encode(*composite(photos, pair, rng, plain=i % 2 == 0))
            for name, match in matches.items():
                rows[name].append(inside_share(match, [references[s] for s in pair], target, masks))
        yield title, rows


def main() -> None:
    """Prints one line per setting and match."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument(
        "--composites", type=int, default=200, help="composites of each of the two kinds"
    )
    parser.add_argument("--prototypes", type=int, nargs="+", default=[16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean", action="store_true")
    arguments = parser.parse_args()
    matches = {", every patch": match_with_background} | {
        f", {count} prototypes": functools.partial(match_with_background, count=count)
        for count in arguments.prototypes
    }
    if arguments.mean:
        matches[", mean alone"] = match_by_mean
    results = measure(
        Photos(arguments.data),
        make_features(arguments.weights),
        arguments.composites,
        arguments.seed,
        matches,
    )
    for title, rows in results:
        for name, values in rows.items():
            if values:
                inside, chance = 100 * np.mean(values, axis=0)
                error = 100 * np.std([row[0] for row in values]) / len(values) ** 0.5
                print(
                    f"{title + name:50s} inside {inside:5.1f} % (standard error {error:.1f})  "
                    f"chance {chance:4.1f} %  {len(values)} images",
                    flush=True,
                )


if __name__ == "__main__":
    main()
