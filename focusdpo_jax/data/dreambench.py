"""Preference pairs from photographs in DreamBench's layout, written as a manifest with its images.

    <subject>/00.jpg, 00_mask.png, 01.jpg, ...    prompts_and_classes.txt ("subject_name,class")

Every photograph of a subject is the chosen image of two pairs, with another photograph of the same
subject as the reference. The rejected images are:

- a *photograph* of another subject of the class, if there is one: everything differs;
- a *composite*: the photograph itself with its subject replaced, by another subject of the class
  that is pasted over a filled hole, or, if the class has no other, by itself in another colour.

The layout is that of github.com/google/dreambooth's data set, with a mask next to every photograph.
"""

import json
import re
from collections.abc import Iterable

import cv2
import numpy as np
from absl import logging
from etils import epath

from focusdpo_jax.array_types import Mask, RGBImage
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
"""Matches the file names of photographs, and not those of masks."""

_SEAM = 9  # Pixels over which a pasted subject fades into its background.


def write_manifest(folder: epath.PathLike, target: epath.PathLike) -> epath.Path:
    """Writes `target`/manifest.jsonl and the images that it refers to.

    Args:
      folder: the DreamBench data set.
      target: output folder; made if missing.

    Returns:
      The manifest's path.

    Raises:
      UserError: the folder has another layout, or a photograph cannot be used.
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


def _find(folder: epath.Path) -> dict[str, list[epath.Path]]:
    """Returns {subject: photographs with a mask} for subjects with at least two of them."""
    if not folder.is_dir():
        raise UserError(
            f"--dreambench={folder} is not a folder; give one with a folder per subject"
        )
    photos = {}
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        masked = sorted(
            path
            for path in subject.iterdir()
            if PHOTO.match(path.name) and mask_path(path).exists()
        )
        if len(masked) > 1:
            photos[subject.name] = masked
    if not photos:
        raise UserError(
            f"--dreambench={folder} has no folder with two photographs and their "
            "masks; a subject's folder holds 00.jpg, 00_mask.png, 01.jpg and so on"
        )
    return photos


def classes(listing: str, subjects: Iterable[str]) -> dict[str, str]:
    """Returns {subject: class}.

    Args:
      listing: text of prompts_and_classes.txt, or "". A subject that it does not list gets its
        folder's name without digits as its class, or "subject" if nothing is left.
      subjects: names of folders.
    """
    rows = listing.splitlines()
    table = dict(row.strip().split(",") for row in rows if re.fullmatch(r"\w+,[\w ]+", row.strip()))
    return {
        s: table.get(s) or s.rstrip("0123456789").replace("_", " ").strip(" -") or "subject"
        for s in subjects
    }


def with_article(kind: str) -> str:
    """Returns a class as captions write it: "a dog", "an apple", "glasses"."""
    article = "" if re.search(r"[^s]s$", kind) else "an " if kind[0] in "aeiou" else "a "
    return article + kind


def mask_path(photo: epath.Path) -> epath.Path:
    """Returns the path of a photograph's mask, which need not exist."""
    return photo.with_name(f"{photo.stem}_mask.png")


def _pairs(
    path: epath.Path, reference: epath.Path, other: epath.Path | None, kind: str, target: epath.Path
) -> list[dict]:
    """Returns the manifest lines with the photograph `path` as chosen image; writes their files."""
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


def _load(path: epath.Path) -> tuple[RGBImage, Mask]:
    """Reads a photograph and its mask."""
    file = path
    try:
        image = decode_image(path.read_bytes())[0]
        file = mask_path(path)
        mask = decode_mask(file.read_bytes())
    except UnreadableImage as error:
        raise UserError(f"{file} {error}") from error
    if mask.shape != image.shape[:2] or not mask.any():
        raise UserError(
            f"{file} is empty, or its size differs from that of {path.name}; correct it"
        )
    return image, mask


def _covering(image: RGBImage, shape: tuple[int, int]) -> RGBImage:
    """Crops the centre of an image to the aspect ratio of `shape` and resizes it to `shape`."""
    height, width = image.shape[:2]
    scale = min(height / shape[0], width / shape[1])
    inner = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    part = image[top : top + inner[0], left : left + inner[1]]
    return cv2.resize(part, shape[::-1], interpolation=cv2.INTER_AREA)


def _replaced(
    image: RGBImage, mask: Mask, other: RGBImage, other_mask: Mask
) -> tuple[RGBImage, Mask]:
    """Replaces an image's subject by that of another; returns the result and the changed region."""
    hole = cv2.dilate(mask.astype(np.uint8), np.ones((_SEAM, _SEAM), np.uint8))
    background = _filled(image, hole)
    (y0, y1), (x0, x1) = geometry.bounds(mask)
    (v0, v1), (u0, u1) = geometry.bounds(other_mask)
    # Scaled to the area of the replaced subject, and centred on it.
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


def _tinted(image: RGBImage, mask: Mask) -> tuple[RGBImage, Mask]:
    """Gives an image's subject the opposite colour; returns the result and the changed region."""
    soft = cv2.GaussianBlur(mask.astype(np.uint8) * 255, (_SEAM, _SEAM), 0)[..., None] / 255
    mean = image[mask].mean(0)
    tint = mean.max() + mean.min() - mean  # The opposite hue of the same strength.
    if np.ptp(tint) < 40:
        tint = np.array([200.0, 60.0, 60.0])  # A grey subject has no opposite hue.
    light = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    light = (40 + 0.85 * light)[..., None] / 128
    colored = np.clip(light * tint, 0, 255)
    result = np.rint(image * (1 - soft) + colored * soft).astype(np.uint8)
    return result, soft[..., 0] > 0


def _filled(image: RGBImage, hole: np.ndarray) -> RGBImage:
    """Inpaints the hole smoothly from its border, at a quarter of the resolution (Telea)."""
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
