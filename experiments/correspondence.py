"""How well SPAF's match finds subjects on real photographs, with DINOv2's features.

    python -m experiments.correspondence --data=DREAMBENCH --weights=DINOV2

`--data` is a folder with `<subject>/00.jpg`, `00_mask.png` and so on, and DreamBench's
`prompts_and_classes.txt`; `--weights` is a folder of DINOv2 as transformers lays it out. At 448 px
(32 x 32 patches), and with k half of the subject's area:

    one subject    its first photo against its others: the share of matched patches inside the mask
    composites     its first photo, and another subject's, against a picture made of cut-outs of two
                   further photos, 200 px each, on a third one's background (its subject painted
                   over) or plain grey, by turns: the share of matched patches on the right one

`inside` averages over pictures, `chance` is what patches drawn at random would give. Each setting
is measured with every patch of a reference standing for itself, and with `--prototypes` means of
them, as `config.focus.prototypes` has it. `--mean` also takes the figures of one prototype a
subject, without the contest with the references' backgrounds.
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
# Of ViT-S's 12: later ones know better what a thing is than which one.
LAYERS = (8, 9, 10)


class Photos:
    """The subjects of a folder, their classes and their photographs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self.classes = {}
        for line in (self.folder / "prompts_and_classes.txt").read_text().splitlines():
            subject, comma, kind = line.strip().partition(",")
            if comma and len(list(self.folder.glob(f"{subject}/??_mask.png"))) > 1:
                self.classes[subject] = kind

    def count(self, subject):
        """How many photographs there are of a subject."""
        return len(list(self.folder.glob(f"{subject}/??_mask.png")))

    def read(self, subject, number):
        """Photograph uint8 [448, 448, 3] and bool mask [448, 448]."""
        path = self.folder / subject / f"{number:02d}.jpg"
        size = (SIDE, SIDE)
        picture = Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        mask = Image.open(path.with_name(f"{number:02d}_mask.png")).convert("L")
        return np.asarray(picture), np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) > 127

    def cut_out(self, subject, number):
        """The subject alone, its longer side 200 px: picture and mask."""
        picture, mask = self.read(subject, number)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        picture, mask = Image.fromarray(picture[box]), Image.fromarray(mask[box])
        scale = OBJECT / max(picture.size)
        width, height = (max(1, round(scale * length)) for length in picture.size)
        size = width, height
        mask = mask.convert("L").resize(size, Image.Resampling.BILINEAR)
        return np.asarray(picture.resize(size, Image.Resampling.BICUBIC)), np.asarray(mask) > 127

    def background(self, subject, number):
        """A photograph whose subject is painted over from around it."""
        picture, mask = self.read(subject, number)
        mask = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15)))
        small = (SIDE // 4, SIDE // 4)
        painted = cv2.inpaint(
            cv2.resize(picture, small), cv2.resize(mask, small), 5, cv2.INPAINT_TELEA
        )
        return np.where(mask[..., None] > 0, cv2.resize(painted, (SIDE, SIDE)), picture)


def composite(photos, pair, draw, plain):
    """Two cut-outs beside each other: picture uint8 [448, 448, 3] and masks [2, 448, 448]."""
    others = [subject for subject in photos.classes if subject not in pair]
    if plain or not others:
        picture = np.full((SIDE, SIDE, 3), draw.integers(60, 200), np.uint8)
    else:
        other = others[draw.integers(len(others))]
        picture = photos.background(other, int(draw.integers(photos.count(other)))).copy()
    masks = np.zeros((2, SIDE, SIDE), bool)
    for side, subject in enumerate(pair):
        # Not the first photo, which is the reference.
        cut, mask = photos.cut_out(subject, int(draw.integers(1, photos.count(subject))))
        height, width = mask.shape
        top = draw.integers(SIDE - height + 1)
        left = side * SIDE // 2 + draw.integers(SIDE // 2 - width + 1)
        picture[top : top + height, left : left + width][mask] = cut[mask]
        masks[side, top : top + height, left : left + width] = mask
    return picture, masks


def make_features(folder: pathlib.Path):
    """The function pictures uint8 [B, 448, 448, 3] -> patch features [B, 32, 32, D].

    Those of several layers, each of length 1, side by side: a cosine is the mean of theirs.
    """
    model, parameters = dino.load(folder)
    mean, deviation = np.array(preprocess.DINO.mean), np.array(preprocess.DINO.deviation)

    @jax.jit
    def features(parameters, pictures):
        pictures = (pictures / 255.0 - mean) / deviation
        found: Any = model.apply(
            {"params": parameters}, pictures.astype(jnp.float32), capture=LAYERS
        )
        captured = found.captured
        states = [
            captured[layer] / jnp.linalg.norm(captured[layer], axis=-1, keepdims=True)
            for layer in LAYERS
        ]
        states = jnp.concatenate(states, axis=-1)[:, 1:]
        return states.reshape(len(pictures), GRID, GRID, -1)

    return lambda pictures: features(parameters, jnp.asarray(pictures))


def on_patches(masks):
    """The share of each patch that masks [..., 448, 448] cover: float32 [..., 32, 32]."""
    cells = masks.reshape(*masks.shape[:-2], GRID, PATCH, GRID, PATCH)
    return cells.mean((-3, -1), dtype=np.float32)


@functools.partial(jax.jit, static_argnames="count")
def match_by_contest(references, reference_masks, target, area, count: int = 0):
    """SPAF's match [S, h, w] as `focus.correspondence` makes it.

    Args:
      references: [S, h, w, D]; reference_masks: [S, h, w]; target: [h, w, D].
      area: [S], of the subjects in the target, in patches.
      count: prototypes a subject; 0 takes every patch of its reference for one.
    """
    subjects, *_, channels = references.shape
    features = references.reshape(1, subjects, -1, channels)
    masks, present = reference_masks.reshape(1, subjects, -1), jnp.ones((1, subjects), bool)
    if count:
        described = correspondence.subject_and_background_prototypes(
            features, masks, present, count
        )
    else:
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        inside = masks[..., None] > 0.5
        described = jnp.stack([features * inside, features * ~inside], axis=2)
    similarity, background = correspondence.prototype_similarity(described, target[None])
    return correspondence.match(similarity, present, area[None], 0.5, background).subjects[0]


@jax.jit
def match_by_mean(references, reference_masks, target, area):
    """The same with one prototype a subject and no background."""
    subjects, *_, channels = references.shape
    present = jnp.ones((1, subjects), bool)
    means = correspondence.prototypes(
        references.reshape(1, subjects, -1, channels),
        reference_masks.reshape(1, subjects, -1),
        present,
    )
    similarity = correspondence.cosine_similarity(means, target[None])
    return correspondence.match(similarity, present, area[None], 0.5).subjects[0]


def hits(match, references, target, masks):
    """Share of the matched patches that lie on the right subject, mean over subjects; chance."""
    features, reference_masks = (np.stack(part) for part in zip(*references))
    found = np.asarray(match(features, reference_masks, target, masks.sum((1, 2))))
    inside = (found * masks).sum((1, 2)) / np.maximum(found.sum((1, 2)), 1)
    return inside.mean(), masks.mean()


def measure(photos, features, count: int, seed: int, matches):
    """Yields (name, rows of (inside, chance) by match) of the three settings."""

    def seen(picture, mask):
        return np.asarray(features(picture[None])[0]), on_patches(mask)

    references = {subject: seen(*photos.read(subject, 0)) for subject in photos.classes}
    rows = {name: [] for name in matches}
    for subject in photos.classes:
        for number in range(1, photos.count(subject)):
            target, mask = seen(*photos.read(subject, number))
            for name, match in matches.items():
                rows[name].append(hits(match, [references[subject]], target, mask[None]))
    yield "one subject", rows

    pairs = list(itertools.permutations(photos.classes, 2))
    for same, title in ((False, "two subjects of different classes"), (True, "of one class")):
        draw = np.random.default_rng((seed, same))
        fitting = [p for p in pairs if (photos.classes[p[0]] == photos.classes[p[1]]) == same]
        rows = {name: [] for name in matches}
        for i in range(count if fitting else 0):
            pair = fitting[draw.integers(len(fitting))]
            target, masks = seen(*composite(photos, pair, draw, plain=i % 2 == 0))
            for name, match in matches.items():
                rows[name].append(hits(match, [references[s] for s in pair], target, masks))
        yield title, rows


def main() -> None:
    """Prints a line a setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--composites", type=int, default=200, help="of each of the two kinds")
    parser.add_argument("--prototypes", type=int, nargs="+", default=[16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean", action="store_true")
    arguments = parser.parse_args()
    matches = {", every patch": match_by_contest} | {
        f", {count} prototypes": functools.partial(match_by_contest, count=count)
        for count in arguments.prototypes
    }
    if arguments.mean:
        matches[", mean alone"] = match_by_mean
    found = measure(
        Photos(arguments.data),
        make_features(arguments.weights),
        arguments.composites,
        arguments.seed,
        matches,
    )
    for title, rows in found:
        for name, values in rows.items():
            if values:
                inside, chance = 100 * np.mean(values, axis=0)
                error = 100 * np.std([row[0] for row in values]) / len(values) ** 0.5
                print(
                    f"{title + name:50s} inside {inside:5.1f} % (standard error {error:.1f})  "
                    f"chance {chance:4.1f} %  {len(values)} pictures",
                    flush=True,
                )


if __name__ == "__main__":
    main()
