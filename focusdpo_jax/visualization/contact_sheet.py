"""An image of some records of a prepared data set, for inspection before training."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.visualization import grids

_SIDE = 160  # Side of an image on the page, in pixels.
_GREY = 110
_TINTS = np.array([(255, 70, 70), (60, 140, 255), (70, 200, 90), (240, 180, 40)])


def draw(path: epath.PathLike, records: Sequence[dict]) -> None:
    """Writes the contact sheet as PNG.

    Each row shows one record: its references, greyed outside their masks; chosen; rejected; and the
    masks: chosen greyed outside `prior_mask`, with subjects tinted in the order of the references.

    Args:
      path: path of the file.
      records: preference records, at least one.
    """
    rows = [
        grids.PreferenceRow(
            caption=record["caption"],
            references=[
                _fit(_marked(s["reference"], s["reference_mask"])) for s in record["subjects"]
            ],
            chosen=_fit(record["chosen"]),
            rejected=_fit(record["rejected"]),
            masks=_fit(_masks(record)),
        )
        for record in records
    ]
    grids.save_png(path, grids.preference_grid(rows, scale=1))


def _masks(record: dict) -> RGBImage:
    image = _marked(record["chosen"], record["prior_mask"]).astype(np.float32)
    for i, subject in enumerate(record["subjects"]):
        mask = subject["mask"]
        image[mask] = 0.6 * image[mask] + 0.4 * _TINTS[i % len(_TINTS)]
    return image.astype(np.uint8)


def _marked(image: RGBImage, mask: Mask) -> RGBImage:
    """Returns the image, dim and grey outside the mask."""
    dim = (image.mean(-1, keepdims=True) * 0.3 + _GREY).astype(np.uint8)
    return np.where(mask[..., None], image, dim)


def _fit(image: RGBImage) -> RGBImage:
    return np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX))
