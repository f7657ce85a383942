"""Preparation of images against transformers' image processors, those that work with Pillow."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from focusdpo_jax.vision import preprocess
from tests.shared import shared

IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    # What facebook/dinov2-small and larger have.
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}, **IMAGENET),
    # A ViT's processor scales to a square.
    "vit": ViTImageProcessorPil(size={"height": 224, "width": 224}, **IMAGENET),
    "odd": CLIPImageProcessorPil(
        size={"shortest_edge": 100},
        crop_size={"height": 71, "width": 94},
        resample=Image.Resampling.LANCZOS,
    ),
}


def difference(image, name):
    """Returns the largest difference of our pixels and theirs, which are in about [-2, 3]."""
    processor = PROCESSORS[name]
    ours = preprocess.preprocess(image, preprocess.from_config(processor.to_dict()))
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max()


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("height, width", [(301, 417), (150, 97), (224, 224)])
def test_pixels(name, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    assert difference(pixels, name) < 1e-6


def test_pixels_of_a_photograph():
    photo = Image.open(shared("dreambench/dog/00.jpg")).crop((30, 0, 430, 512))
    for name in PROCESSORS:
        assert difference(photo, name) < 1e-6


def test_settings():
    assert preprocess.from_config(PROCESSORS["clip"].to_dict()) == preprocess.CLIP
    assert preprocess.from_config(PROCESSORS["dinov2"].to_dict()) == preprocess.DINO


def test_older_files():
    """Before sizes were dicts, one number was the shorter side for CLIP and a square for ViT."""
    published = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": 224,
        "size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    assert preprocess.from_config(published) == preprocess.CLIP
    square = preprocess.from_config(
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, **IMAGENET}
    )
    assert square == preprocess.from_config(PROCESSORS["vit"].to_dict())
    assert square.resize == (224, 224) and square.crop is None
