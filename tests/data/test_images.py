"""Files of every kind become the picture that their owner sees."""

import example_pairs
import numpy as np
import pytest
from PIL import Image, ImageFile

from focusdpo_jax.data import images
from focusdpo_jax.data.images import UnreadableImage, decode_mask, decode_picture, encode_png

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def test_plain_pictures_are_unchanged():
    for kind in ("PNG", "BMP", "TIFF"):
        picture, changes = decode_picture(example_pairs.encoded(PIXELS, kind))
        np.testing.assert_array_equal(picture, PIXELS)
        assert changes == ()
    np.testing.assert_array_equal(decode_picture(encode_png(PIXELS))[0], PIXELS)


@pytest.mark.parametrize(("orientation", "turn"), [
    (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]),
    (4, lambda x: x[::-1]), (5, lambda x: x.transpose(1, 0, 2)), (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)), (8, lambda x: np.rot90(x))])
def test_exif_turns_picture_and_mask(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, changes = decode_picture(example_pairs.encoded(PIXELS, exif=exif))
    np.testing.assert_array_equal(picture, turn(PIXELS))
    assert changes == (() if orientation == 1 else ("rotated",))
    mask = PIXELS[..., 0] > 128
    turned = decode_mask(example_pairs.encoded(mask, exif=exif))
    np.testing.assert_array_equal(turned, turn(mask[..., None])[..., 0])


def test_transparency_is_over_white():
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[:, :4], alpha[0, 7] = 0, 51
    picture, changes = decode_picture(example_pairs.encoded(np.dstack([PIXELS, alpha])))
    assert changes == ("alpha",) and (picture[:, :4] == 255).all()
    np.testing.assert_array_equal(picture[1:, 4:], PIXELS[1:, 4:])
    mixed = PIXELS[0, 7] * 0.2 + 255 * 0.8
    np.testing.assert_allclose(picture[0, 7], mixed, atol=1)


def test_palette_with_a_transparent_colour():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture, changes = decode_picture(example_pairs.encoded(image, transparency=1))
    assert changes == ("palette", "alpha")
    assert picture.tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]


def test_cmyk():
    image = Image.fromarray(np.full((2, 2, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    picture, changes = decode_picture(example_pairs.encoded(image, "TIFF"))
    assert changes == ("cmyk",) and picture[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_keep_their_brightness():
    values = np.array([[0, 257 * 100, 65535, 257 * 7 + 128]], np.uint16)
    picture, changes = decode_picture(example_pairs.encoded(Image.fromarray(values)))
    assert changes == ("16 bit",)
    assert picture[0, :, 1].tolist() == [0, 100, 255, 7]
    assert decode_mask(example_pairs.encoded(Image.fromarray(values))).tolist() == [
        [False, False, True, False]]


def test_grey_and_bits():
    grey = PIXELS[..., 0]
    picture, changes = decode_picture(example_pairs.encoded(grey))
    np.testing.assert_array_equal(picture, np.repeat(grey[..., None], 3, -1))
    assert changes == ("grey",)
    np.testing.assert_array_equal(
        decode_mask(example_pairs.encoded(Image.fromarray(grey > 99))), grey > 99)


def test_a_cut_out_is_its_own_mask():
    alpha = np.zeros((6, 8), np.uint8)
    alpha[2:4, 3:7] = 255
    mask = decode_mask(example_pairs.encoded(np.dstack([PIXELS, alpha])))
    np.testing.assert_array_equal(mask, alpha > 0)
    opaque = np.dstack([np.repeat(alpha[..., None], 3, -1), np.full_like(alpha, 255)])
    np.testing.assert_array_equal(decode_mask(example_pairs.encoded(opaque)), alpha > 0)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    content = example_pairs.encoded(PIXELS)
    monkeypatch.setattr(images, "MAX_PIXELS", 47)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="is 6 x 8 pixels, more than"):
        decode_picture(content)


def test_programs_are_not_pictures():
    """Pillow would hand PostScript to Ghostscript."""
    with pytest.raises(UnreadableImage, match="is no picture in PNG"):
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n")
