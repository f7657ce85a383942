"""Masks of the subject of photographs, from DINOv2's patch features.

    python -m experiments.photograph_masks --photographs=DREAMBENCH --dinov2=DIR [--sheet=masks.png]

PHOTOGRAPHS is a folder in DreamBench's layout. NN_mask.png is written beside every photograph that
has none. The photograph's patches are cut in two by TokenCut (Wang et al., arXiv 2202.11539), and
the subject's part is refined to pixels by GrabCut (Rother et al. 2004). A fraction of the masks is
wrong: inspect the sheet, and replace or remove bad ones (docs/reproduce.md has figures).

    python -m experiments.photograph_masks --photographs=DREAMBENCH --dinov2=DIR --measure

compares such masks with those that the folder has, and writes nothing.
"""

import argparse

import cv2
import numpy as np
import scipy.linalg
from etils import epath
from jaxtyping import Float

from focusdpo_jax import command
from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.data import dreambench
from focusdpo_jax.data.images import encode_png, read_image
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.vision import encoders, regions
from focusdpo_jax.visualization import grids

# Cosine from which two patches are connected; chosen among 0.2, 0.35 and 0.5 on 105 photographs.
_CONNECTED = 0.35
_UNCONNECTED = 1e-5  # Weight of all other pairs of patches.
_SIDE, _COLUMNS = 96, 20  # Of the sheet.


def subject_patches(features: Float[np.ndarray, "g_y g_x D"]) -> Mask:
    """Returns the patches of the most salient object, bool [g_y, g_x]; at least one is True.

    Args:
      features: unit vectors of the image's patches.
    """
    rows, columns = features.shape[:2]
    flat = features.reshape(rows * columns, -1).astype(np.float64)
    weights = np.where(flat @ flat.T > _CONNECTED, 1.0, _UNCONNECTED)
    scale = weights.sum(1) ** -0.5
    laplacian = np.eye(len(flat)) - scale[:, None] * weights * scale
    vector = scale * scipy.linalg.eigh(laplacian, subset_by_index=[1, 1])[1][:, 0]
    part = vector > vector.mean()
    if not part[np.abs(vector).argmax()]:
        part = ~part
    part = part.reshape(rows, columns)
    if part[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:  # The background fills the corners.
        part = ~part
    areas, labels = _components(part)
    return labels == 1 + areas.argmax() if len(areas) else part | True


def _components(part: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Returns the areas of the connected components, and the number of each pixel's, from 1."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(part.astype(np.uint8), connectivity=4)
    return stats[1:, cv2.CC_STAT_AREA], labels


def refine(image: RGBImage, patches: Mask) -> Mask:
    """Returns a mask in pixels, bool [H, W], whose border follows the image's colours.

    Args:
      image: uint8 [H, W, 3].
      patches: bool [g_y, g_x] of the whole image.
    """
    height, width = image.shape[:2]
    rough = cv2.resize(patches.astype(np.float32), (width, height)) > 0.5
    band = np.ones((max(3, height // 16), max(3, width // 16)), np.uint8)
    labels = np.where(rough, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[cv2.erode(rough.astype(np.uint8), band) > 0] = cv2.GC_FGD
    labels[cv2.dilate(rough.astype(np.uint8), band) == 0] = cv2.GC_BGD
    if not (np.isin(labels, (0, 2)).any() and np.isin(labels, (1, 3)).any()):
        return rough if rough.any() else ~rough
    cv2.setRNGSeed(0)  # Of its clustering of colours.
    cv2.grabCut(
        np.ascontiguousarray(image),
        labels,
        (0, 0, width, height),  # Not read in this mode.
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        5,
        cv2.GC_INIT_WITH_MASK,
    )
    fine = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return fine if fine.any() else rough


def main(argv: list[str] | None = None) -> None:
    """Writes or measures masks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photographs", required=True, help="folder in DreamBench's layout")
    parser.add_argument("--dinov2", required=True, help="DINOv2 in transformers' layout")
    parser.add_argument("--sheet", help="PNG file for all masks, to inspect")
    parser.add_argument("--measure", action="store_true", help="compare with the masks there are")
    given = parser.parse_args(argv)
    try:
        _run(given.photographs, given.dinov2, given.sheet, given.measure)
    except UserError as error:
        command.fail(error)


def _run(folder: str, dinov2: str, sheet: str | None, measure: bool) -> None:
    photos = sorted(p for p in epath.Path(folder).glob("*/*") if dreambench.PHOTO.match(p.name))
    if not photos:
        raise UserError(f"--photographs={folder} has no folders of photographs")
    encode = encoders.load_dino("dinov2", dinov2, batch_size=4)[2]
    overlaps, cells, progress = [], [], ItemProgress("photographs", len(photos))
    for photo in photos:
        image, known = read_image(photo), dreambench.mask_path(photo).exists()
        mask = None
        if known:
            mask = regions.read_mask(dreambench.mask_path(photo), image.shape[:2])
        if measure == known:
            made = refine(image, subject_patches(encode([image])[0]))
            if measure and mask is not None:
                overlaps.append((made & mask).sum() / (made | mask).sum())
            elif not measure:
                replace_file(dreambench.mask_path(photo), encode_png(made))
            mask = made
        if sheet and mask is not None:
            shown = np.where(mask[..., None], image, image // 4 + 96)
            cells.append(cv2.resize(shown, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA))
        progress.add(1)
    if overlaps:
        print(
            f"intersection over union of {len(overlaps)} masks: mean {np.mean(overlaps):.3f}, "
            f"median {np.median(overlaps):.3f}, above 0.7 for {np.mean(np.array(overlaps) > 0.7):.1%}"
        )
    if sheet:
        cells += [np.full_like(cells[0], 255)] * (-len(cells) % _COLUMNS)
        rows = [np.concatenate(cells[i : i + _COLUMNS], 1) for i in range(0, len(cells), _COLUMNS)]
        grids.save_png(sheet, np.concatenate(rows))


if __name__ == "__main__":
    main()
