"""Image preprocessing for CLIP and DINO: resize, centre crop and normalisation like the originals.

The steps are those of torchvision's transforms on Pillow images, which CLIP's and DINO's authors
used, and of transformers' image processors. Pillow's resize filters over all pixels that a result
pixel covers (antialiasing) and rounds to uint8; then follow the centre crop and the normalisation.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.errors import UserError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Prefixes of transformers' image processors; True if a size given as one number means a square.
_PROCESSORS = {"CLIP": False, "Bit": False, "ViT": True}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Settings of the preprocessing.

    Attributes:
      resize: length of the shorter side, with the aspect ratio kept; or (height, width). In pixels.
      crop: (height, width) of the centre crop; None for no crop.
      mean, deviation: mean and standard deviation of the channels of an image in [0, 1].
      resample: Pillow's filter.

    Raises:
      UserError: the crop is larger than the resized image.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self):
        smallest = (self.resize,) * 2 if isinstance(self.resize, int) else self.resize
        if self.crop is not None and any(np.greater(self.crop, smallest)):
            raise UserError(f"crop = {self.crop}: make it at most resize = {self.resize}")


# The transform of github.com/openai/CLIP for ViT-B/32, B/16 and L/14.
CLIP = Preprocessing(224, (224, 224), *_OPENAI)
# The evaluation transform of github.com/facebookresearch/dino and of DINOv2.
DINO = Preprocessing(256, (224, 224), *_IMAGENET)


def from_config(values: dict[str, Any]) -> Preprocessing:
    """Converts a transformers `preprocessor_config.json` to `Preprocessing`.

    Args:
      values: dict of the file, of a processor for CLIP, ViT (DINO) or BiT (DINOv2).

    Raises:
      UserError: the file requires another processor, or omits a step that all of these have.
    """
    kind = values.get("image_processor_type", values.get("feature_extractor_type", ""))
    family = next((name for name in _PROCESSORS if kind.startswith(name)), None)
    if family is None:
        raise UserError(
            f"image_processor_type = {kind!r}: only those of {', '.join(_PROCESSORS)} are supported"
        )
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(step, True):
            raise UserError(f"{step} = {values[step]!r}: only true is supported")
    if not np.isclose(values.get("rescale_factor", 1 / 255), 1 / 255):
        raise UserError(f"rescale_factor = {values['rescale_factor']}: only 1 / 255 is supported")
    try:
        resize, crop = values["size"], None
        if isinstance(resize, int) and _PROCESSORS[family]:
            resize = (resize, resize)
        elif isinstance(resize, dict):
            resize = resize.get("shortest_edge") or (resize["height"], resize["width"])
        if values.get("do_center_crop", False):
            crop = values["crop_size"]
            crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        return Preprocessing(
            resize,
            crop,
            tuple(values["image_mean"]),
            tuple(values["image_std"]),
            Image.Resampling(values["resample"]),
        )
    except KeyError as error:
        raise UserError(f"preprocessor_config.json has no {error}") from error


def preprocess(
    image: RGBImage | Image.Image, settings: Preprocessing
) -> Float32[np.ndarray, "height width 3"]:
    """Preprocesses one image for an encoder.

    Args:
      image: uint8 [H, W, 3], or a Pillow image of any mode.
      settings: settings of the encoder.

    Returns:
      float32 [height, width, 3].
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if isinstance(settings.resize, int):
        # The longer side is rounded down, as torchvision does it.
        shorter = min(image.size)
        width, height = (int(settings.resize * side / shorter) for side in image.size)
    else:
        height, width = settings.resize
    pixels = np.asarray(image.resize((width, height), settings.resample))
    if settings.crop is not None:
        # The smaller half of an odd margin is above and on the left, as in transformers.
        top, left = (height - settings.crop[0]) // 2, (width - settings.crop[1]) // 2
        pixels = pixels[top : top + settings.crop[0], left : left + settings.crop[1]]
    pixels = pixels.astype(np.float32) / 255
    mean, deviation = np.array(settings.mean, np.float32), np.array(settings.deviation, np.float32)
    return (pixels - mean) / deviation
