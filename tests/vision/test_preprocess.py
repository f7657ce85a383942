import dataclasses

import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.errors import UserError
from focusdpo_jax.vision import preprocess
from focusdpo_jax.vision.preprocess import CLIP, DINO, Preprocessing

# Leaves pixels as they are, from 0 to 255.
BYTES = Preprocessing(4, None, (0, 0, 0), (1 / 255,) * 3, Image.Resampling.BOX)


def test_size_crop_and_scale():
    image = np.zeros((4, 7, 3), np.uint8)
    image[..., 0] = np.arange(4)[:, None]
    image[..., 1] = np.arange(7)
    out = preprocess.preprocess(image, BYTES)
    assert out.shape == (4, 7, 3) and out.dtype == np.float32
    np.testing.assert_allclose(out, image, atol=1e-4)
    # Of margins 1 and 4 - 1, the smaller parts are above and on the left.
    out = preprocess.preprocess(image, dataclasses.replace(BYTES, crop=(3, 4)))
    np.testing.assert_allclose(out, image[0:3, 1:5], atol=1e-4)
    # The longer side is 7 / 4 * 3 = 5.25, rounded down.
    assert preprocess.preprocess(image, dataclasses.replace(BYTES, resize=3)).shape == (3, 5, 3)
    square = dataclasses.replace(BYTES, resize=(6, 2))
    assert preprocess.preprocess(image, square).shape == (6, 2, 3)
    white = preprocess.preprocess(np.full((300, 260, 3), 255, np.uint8), CLIP)
    np.testing.assert_allclose(white[5, 7], [1.93033, 2.07488, 2.14590], atol=1e-4)


def test_shrinking_averages():
    """Stripes of one pixel turn grey; without antialiasing they would stay black or white."""
    image = np.zeros((512, 512, 3), np.uint8)
    image[:, ::2] = 255
    out = preprocess.preprocess(image, DINO) * preprocess.DINO.deviation + preprocess.DINO.mean
    np.testing.assert_allclose(out, 0.5, atol=0.01)


def test_other_modes():
    grey = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    out = preprocess.preprocess(grey, BYTES)
    np.testing.assert_allclose(out[..., 2], np.arange(16).reshape(4, 4), atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"crop = \(224, 224\): .* resize = 200"):
        dataclasses.replace(DINO, resize=200)
    values = {"image_processor_type": "CLIPImageProcessor", "size": 224, "resample": 3}
    with pytest.raises(UserError, match="preprocessor_config.json has no 'image_mean'"):
        preprocess.from_config(values)
    with pytest.raises(UserError, match="image_processor_type = 'SiglipImageProcessor'"):
        preprocess.from_config(values | {"image_processor_type": "SiglipImageProcessor"})
    with pytest.raises(UserError, match="do_normalize = False"):
        preprocess.from_config(values | {"do_normalize": False})
    with pytest.raises(UserError, match="rescale_factor = 1: only 1 / 255"):
        preprocess.from_config(values | {"rescale_factor": 1})
