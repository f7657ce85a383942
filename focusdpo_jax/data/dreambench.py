"""Preference pairs from photographs in DreamBench's layout, as a manifest with its images.

    <subject>/00.jpg, 00_mask.png, 01.jpg, ...    prompts_and_classes.txt ("subject_name,class")

Every photograph of a subject is chosen twice, with another photograph of the same subject as its
reference. It is preferred to:

- a *photograph* of another subject of the class, where there is one: everything differs;
- a *composite*: the photograph itself with its subject replaced, by another subject of the class
  that is pasted over a filled hole, or, where the class has no other, by itself in another colour.

The layout is that of github.com/google/dreambooth's data set, with a mask beside every photograph.
"""

import json
import re

import cv2
import numpy as np
from absl import logging
from etils import epath

from focusdpo_jax.data import geometry
from focusdpo_jax.data.images import (
    UnreadableImage,
    decode_image,
    decode_mask,
    encode_png,
)
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import remove_unfinished, replace_file

PHOTO = re.compile(r"(?!.*_mask\.).*\.(jpe?g|png|webp)$", re.IGNORECASE)
"""The names of photographs, which those of masks are not."""

_SEAM = 9  # Pixels over which a pasted subject fades into its background.


def write_manifest(folder: epath.PathLike, target: epath.PathLike) -> epath.Path:
    """Writes `target`/manifest.jsonl and the images that it names; returns the manifest's path.

    Raises:
      UserError: the folder is not laid out so, or a photograph cannot be used.
    """
    folder, target = epath.Path(folder), epath.Path(target)
    photos = _find(folder)
    listed = folder / "prompts_and_classes.txt"
    kinds = classes(listed.read_text() if listed.exists() else "", photos)
    logging.info(
        "DreamBench: %d photographs of %d subjects", sum(map(len, photos.values())), len(photos)
    )
    lines = []
    try:
        remove_unfinished(target)
        for subject, paths in photos.items():
            for path in paths:
                for file in (path, mask_path(path)):
                    replace_file(target / subject / file.name, file.read_bytes())
            others = [s for s in photos if kinds[s] == kinds[subject] and s != subject]
            for i, path in enumerate(paths):
                other = photos[others[i % len(others)]] if others else None
                other = other[i % len(other)] if other else None
                reference = paths[(i + 1) % len(paths)]
                lines += _pairs(path, reference, other, kinds[subject], target)
        manifest = target / "manifest.jsonl"
        replace_file(manifest, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(
            f"--output: {target} cannot be written ({error.strerror or error}); give "
            "a folder with room that you may write"
        ) from error
    return manifest


def _find(folder):
    """Subject to its photographs that have a mask, of all subjects with at least two."""
    if not folder.is_dir():
        raise UserError(f"--dreambench={folder} is no folder; give one with a folder a subject")
    photos = {}
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = sorted(
            path
            for path in subject.iterdir()
            if PHOTO.match(path.name) and mask_path(path).exists()
        )
        if len(found) > 1:
            photos[subject.name] = found
    if not photos:
        raise UserError(
            f"--dreambench={folder} has no folder with two photographs and their "
            "masks; a subject's folder holds 00.jpg, 00_mask.png, 01.jpg and so on"
        )
    return photos


def classes(listing, subjects):
    """Subject to class.

    Args:
      listing: text of prompts_and_classes.txt, or "". What is not in it has its folder's name
        without numbers.
      subjects: names of folders.
    """
    rows = listing.splitlines()
    table = dict(row.strip().split(",") for row in rows if re.fullmatch(r"\w+,[\w ]+", row.strip()))
    return {s: table.get(s) or s.rstrip("0123456789").replace("_", " ") for s in subjects}


def with_article(kind):
    """A class as captions name it: "a dog", "an apple", "glasses"."""
    article = "" if re.search(r"[^s]s$", kind) else "an " if kind[0] in "aeiou" else "a "
    return article + kind


def mask_path(photo):
    """Where the mask of a photograph lies, if there is one."""
    return photo.with_name(f"{photo.stem}_mask.png")


def _pairs(path, reference, other, kind, target):
    """The two lines in which the photograph `path` is chosen; writes what they need besides."""
    subject = path.parent.name
    chosen, mask = _load(path)
    name = f"{subject}/{path.stem}"
    phrase = with_article(kind)
    line = {
        "caption": f"a photo of {phrase}",
        "group": subject,
        "chosen": f"{subject}/{path.name}",
        "subjects": [
            {
                "phrase": phrase,
                "mask": f"{subject}/{mask_path(path).name}",
                "reference": f"{subject}/{reference.name}",
                "reference_mask": f"{subject}/{mask_path(reference).name}",
            }
        ],
    }
    if other is None:
        lines, (composite, prior) = [], _tinted(chosen, mask)
    else:
        image, other_mask = _load(other)
        everywhere = np.ones(mask.shape, bool)
        replace_file(target / f"{name}_rejected.png", encode_png(_covering(image, mask.shape)))
        replace_file(target / f"{name}_everywhere.png", encode_png(everywhere))
        lines = [
            line
            | {
                "rejected": f"{name}_rejected.png",
                "info": {"kind": "photograph"},
                "prior_mask": f"{name}_everywhere.png",
            }
        ]
        composite, prior = _replaced(chosen, mask, image, other_mask)
    replace_file(target / f"{name}_composite.png", encode_png(composite))
    replace_file(target / f"{name}_prior.png", encode_png(prior))
    return [
        *lines,
        line
        | {
            "rejected": f"{name}_composite.png",
            "info": {"kind": "composite"},
            "prior_mask": f"{name}_prior.png",
        },
    ]


def _load(path):
    """A photograph and its mask."""
    file = path
    try:
        image = decode_image(path.read_bytes())[0]
        file = mask_path(path)
        mask = decode_mask(file.read_bytes())
    except UnreadableImage as error:
        raise UserError(f"{file} {error}") from error
    if mask.shape != image.shape[:2] or not mask.any():
        raise UserError(f"{file} is empty or of another size than {path.name}; mend it")
    return image, mask


def _covering(image, shape):
    """The middle of an image, as large as fits, in another shape (height, width)."""
    height, width = image.shape[:2]
    scale = min(height / shape[0], width / shape[1])
    inner = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    part = image[top : top + inner[0], left : left + inner[1]]
    return cv2.resize(part, shape[::-1], interpolation=cv2.INTER_AREA)


def _replaced(image, mask, other, other_mask):
    """The image with the other's subject in the place of its own, and where that changed it."""
    hole = cv2.dilate(mask.astype(np.uint8), np.ones((_SEAM, _SEAM), np.uint8))
    background = _filled(image, hole)
    (y0, y1), (x0, x1) = geometry.bounds(mask)
    (v0, v1), (u0, u1) = geometry.bounds(other_mask)
    # As large as what it replaces; its middle where that had its own.
    scale = (mask.sum() / other_mask[v0:v1, u0:u1].sum()) ** 0.5
    move = np.array(
        [
            [scale, 0, (x0 + x1 - scale * (u0 + u1)) / 2],
            [0, scale, (y0 + y1 - scale * (v0 + v1)) / 2],
        ]
    )
    size = mask.shape[::-1]
    pasted = cv2.warpAffine(
        other, move, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    place = cv2.warpAffine(other_mask.astype(np.uint8) * 255, move, size)
    soft = cv2.GaussianBlur(place, (_SEAM, _SEAM), 0)[..., None] / 255
    result = np.rint(background * (1 - soft) + pasted * soft).astype(np.uint8)
    return result, (hole > 0) | (soft[..., 0] > 0)


def _tinted(image, mask):
    """The image with its subject in the opposite colour, and where that changed it."""
    soft = cv2.GaussianBlur(mask.astype(np.uint8) * 255, (_SEAM, _SEAM), 0)[..., None] / 255
    mean = image[mask].mean(0)
    tint = mean.max() + mean.min() - mean  # The opposite hue of the same strength.
    if np.ptp(tint) < 40:
        tint = np.array([200.0, 60.0, 60.0])  # What is grey has none.
    light = image.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])
    light = (40 + 0.85 * light)[..., None] / 128
    colored = np.clip(light * tint, 0, 255)
    result = np.rint(image * (1 - soft) + colored * soft).astype(np.uint8)
    return result, soft[..., 0] > 0


def _filled(image, hole):
    """The image with the hole closed smoothly from its border, at a quarter of the size."""
    size = image.shape[1::-1]
    small = tuple(max(1, side // 4) for side in size)
    rough = cv2.inpaint(
        cv2.resize(image, small, interpolation=cv2.INTER_AREA),
        (cv2.resize(hole * 255, small, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8),
        5,
        cv2.INPAINT_TELEA,
    )
    smooth = cv2.resize(rough, size, interpolation=cv2.INTER_CUBIC)
    return np.where(hole[..., None] > 0, smooth, image)
