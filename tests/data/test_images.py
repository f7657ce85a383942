"""Decoding of image files: orientation, colour, transparency, bit depth, and faults."""

import io

import cv2
import example_pairs
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from focusdpo_jax.data import images
from focusdpo_jax.data.images import (
    UnreadableImage,
    decode_image,
    decode_mask,
    encode_png,
)
from focusdpo_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def test_plain_images_are_unchanged():
    for kind in ("PNG", "BMP", "TIFF"):
        picture, changes = decode_image(example_pairs.encoded(PIXELS, kind))
        np.testing.assert_array_equal(picture, PIXELS)
        assert changes == ()
    np.testing.assert_array_equal(decode_image(encode_png(PIXELS))[0], PIXELS)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_exif_orientation_applies_to_image_and_mask(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, changes = decode_image(example_pairs.encoded(PIXELS, exif=exif))
    np.testing.assert_array_equal(picture, turn(PIXELS))
    assert changes == (() if orientation == 1 else ("rotated",))
    mask = PIXELS[..., 0] > 128
    turned = decode_mask(example_pairs.encoded(mask, exif=exif))
    np.testing.assert_array_equal(turned, turn(mask[..., None])[..., 0])


def test_transparency_is_over_white():
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[:, :4], alpha[0, 7] = 0, 51
    picture, changes = decode_image(example_pairs.encoded(np.dstack([PIXELS, alpha])))
    assert changes == ("alpha",) and (picture[:, :4] == 255).all()
    np.testing.assert_array_equal(picture[1:, 4:], PIXELS[1:, 4:])
    mixed = PIXELS[0, 7] * 0.2 + 255 * 0.8
    np.testing.assert_allclose(picture[0, 7], mixed, atol=1)


def test_palette_with_a_transparent_colour():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture, changes = decode_image(example_pairs.encoded(image, transparency=1))
    assert changes == ("palette", "alpha")
    assert picture.tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]


def test_cmyk():
    image = Image.fromarray(np.full((2, 2, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    picture, changes = decode_image(example_pairs.encoded(image, "TIFF"))
    assert changes == ("cmyk",) and picture[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_keep_their_brightness():
    values = np.array([[0, 257 * 100, 65535, 257 * 7 + 128]], np.uint16)
    picture, changes = decode_image(example_pairs.encoded(Image.fromarray(values)))
    assert changes == ("16 bit",)
    assert picture[0, :, 1].tolist() == [0, 100, 255, 7]
    assert decode_mask(example_pairs.encoded(Image.fromarray(values))).tolist() == [
        [False, False, True, False]
    ]


def test_grey_and_bits():
    grey = PIXELS[..., 0]
    picture, changes = decode_image(example_pairs.encoded(grey))
    np.testing.assert_array_equal(picture, np.repeat(grey[..., None], 3, -1))
    assert changes == ("grey",)
    np.testing.assert_array_equal(
        decode_mask(example_pairs.encoded(Image.fromarray(grey > 99))), grey > 99
    )


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
        decode_image(content)


def test_postscript_is_not_decoded():
    """Pillow would run Ghostscript for PostScript."""
    with pytest.raises(UnreadableImage, match="is not an image in PNG"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n")


def by_pillow(image, profile):
    """The conversion that Pillow documents, with its defaults."""
    return np.asarray(
        ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )
    )


@pytest.mark.parametrize(
    "space", [example_pairs.ADOBE_RGB, example_pairs.DISPLAY_P3], ids=["adobe", "p3"]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_wide_colours_become_srgb(space, kind):
    profile = example_pairs.rgb_profile(*space)
    content = example_pairs.encoded(PIXELS, kind, icc_profile=profile)
    stored = Image.open(io.BytesIO(content)).convert("RGB")
    picture, changes = decode_image(content)
    np.testing.assert_array_equal(picture, by_pillow(stored, profile))
    assert changes == ("colour profile",)
    assert np.abs(picture.astype(int) - np.asarray(stored)).max() > 20


def test_adobe_rgb_by_its_formula():
    """Linear light by the gamma, to XYZ under D50 and back by sRGB's primaries and curve."""
    picture, _ = decode_image(
        example_pairs.encoded(
            PIXELS, icc_profile=example_pairs.rgb_profile(*example_pairs.ADOBE_RGB)
        )
    )
    *primaries, gamma = example_pairs.ADOBE_RGB
    srgb = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
    linear = (PIXELS / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(srgb)
    linear = np.clip(linear, 0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(picture, 255 * curve, atol=1.5)


def test_inks_and_greys_with_a_profile():
    inks = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0] // 3]), "CMYK")
    profile = example_pairs.cmyk_profile()
    for kind in ("TIFF", "JPEG"):
        content = example_pairs.encoded(inks, kind, icc_profile=profile)
        picture, changes = decode_image(content)
        stored = Image.open(io.BytesIO(content))
        np.testing.assert_array_equal(picture, by_pillow(stored, profile))
        assert changes == ("cmyk", "colour profile")
        assert np.abs(picture.astype(int) - np.asarray(stored.convert("RGB"))).max() > 50
    grey, profile = Image.fromarray(PIXELS[..., 0]), example_pairs.grey_profile(1.8)
    picture, changes = decode_image(example_pairs.encoded(grey, icc_profile=profile))
    np.testing.assert_array_equal(picture, by_pillow(grey, profile))
    assert changes == ("grey", "colour profile")
    # Of 16 bits, the same greys; and in the profile of an RGB space.
    wide = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        decode_image(example_pairs.encoded(wide, icc_profile=profile))[0], picture
    )
    profile = example_pairs.rgb_profile(*example_pairs.ADOBE_RGB)
    np.testing.assert_array_equal(
        decode_image(example_pairs.encoded(grey, icc_profile=profile))[0],
        by_pillow(grey.convert("RGB"), profile),
    )


def test_profile_below_transparency_and_in_a_palette():
    profile = example_pairs.rgb_profile(*example_pairs.ADOBE_RGB)
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[:, :4] = 0
    picture, changes = decode_image(
        example_pairs.encoded(np.dstack([PIXELS, alpha]), icc_profile=profile)
    )
    expected = by_pillow(Image.fromarray(PIXELS), profile).copy()
    expected[:, :4] = 255
    np.testing.assert_array_equal(picture, expected)
    assert changes == ("alpha", "colour profile")
    image = Image.fromarray(PIXELS).quantize(8)
    picture, changes = decode_image(example_pairs.encoded(image, icc_profile=profile))
    np.testing.assert_array_equal(picture, by_pillow(image.convert("RGB"), profile))
    assert changes == ("palette", "colour profile")


def test_srgb_and_unusable_profiles_change_no_bit(tmp_path, caplog):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(example_pairs.encoded(PIXELS, icc_profile=srgb))[1] == ()
    for profile in (srgb, b"junk", example_pairs.grey_profile(1.8), srgb[:300]):
        picture, changes = decode_image(example_pairs.encoded(PIXELS, icc_profile=profile))
        np.testing.assert_array_equal(picture, PIXELS)
    assert changes == ("unusable colour profile",)
    path = tmp_path / "broken.png"
    path.write_bytes(example_pairs.encoded(PIXELS, icc_profile=b"junk"))
    np.testing.assert_array_equal(images.read_image(path), PIXELS)
    assert f"{path}: its ICC colour profile is damaged" in caplog.text


def test_profile_does_not_move_a_mask():
    levels = np.arange(240, 16, -14, dtype=np.uint8).reshape(4, 4)
    content = example_pairs.encoded(levels, icc_profile=example_pairs.grey_profile(1.0))
    np.testing.assert_array_equal(decode_mask(content), levels >= 128)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey(kind, order):
    values = np.linspace(0, 65535, 48).round().astype(order).reshape(6, 8)
    picture, changes = decode_image(example_pairs.encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(picture[..., 0], np.rint(values / 257))
    assert np.ptp(picture) == 255 and changes == ("16 bit",)
    np.testing.assert_array_equal(
        decode_mask(example_pairs.encoded(Image.fromarray(values), kind)), values / 257 >= 127.5
    )


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_sixteen_bits_of_colour(kind):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), np.uint16)
    content = cv2.imencode(kind, values[..., ::-1])[1].tobytes()
    picture, _ = decode_image(content)
    np.testing.assert_array_equal(picture, np.asarray(Image.open(io.BytesIO(content))))
    np.testing.assert_allclose(picture, values / 257, atol=1)


def test_values_that_are_not_brightness_are_refused():
    """Floats, 32 bits, and 8 bits stored in 16."""
    floats = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    for content, reason in (
        (example_pairs.encoded(Image.fromarray(floats), "TIFF"), "has 32 bits per channel"),
        (
            example_pairs.encoded(Image.fromarray(np.int32(floats * 70000)), "TIFF"),
            "has 32 bits per channel",
        ),
        (
            cv2.imencode(".tiff", np.repeat(floats[..., None], 3, -1))[1].tobytes(),
            "is a TIFF of an unsupported kind",
        ),
        (
            example_pairs.encoded(Image.fromarray(np.uint16(floats * 255))),
            "no value above 255 of 65535",
        ),
    ):
        for decode in (decode_image, decode_mask):
            with pytest.raises(UnreadableImage, match=reason):
                decode(content)


def test_a_transparent_colour_without_a_palette():
    for dtype, changes in ((np.uint8, ("grey", "alpha")), (np.uint16, ("16 bit", "alpha"))):
        scale = np.iinfo(dtype).max // 255
        grey = Image.fromarray(np.array([[0, 40 * scale, 255 * scale]], dtype))
        content = example_pairs.encoded(grey, transparency=40 * scale)
        picture, changed = decode_image(content)
        assert picture[0, :, 0].tolist() == [0, 255, 255] and changed == changes
        assert decode_mask(content).tolist() == [[True, False, True]]
    content = example_pairs.encoded(PIXELS, transparency=tuple(PIXELS[0, 0].tolist()))
    assert decode_image(content)[0][0, 0].tolist() == [255] * 3


def test_palette_masks():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255, 200, 200, 200])
    assert decode_mask(example_pairs.encoded(image)).tolist() == [[False, True], [True, True]]
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # As data sets of segments number theirs.
    with pytest.raises(UnreadableImage, match="lightest value is 75"):
        decode_mask(example_pairs.encoded(image))


def test_files_that_earlier_versions_decoded_differently():
    adobe = example_pairs.rgb_profile(*example_pairs.ADOBE_RGB)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert images.is_converted(example_pairs.encoded(PIXELS, icc_profile=adobe))
    for content in (
        b"no picture",
        example_pairs.encoded(PIXELS),
        example_pairs.encoded(PIXELS, icc_profile=srgb),
    ):
        assert not images.is_converted(content)


def test_read_errors_contain_the_file(tmp_path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    for name, reason in (("none.png", "no such file"), ("two.gif", "has several frames")):
        for read in (images.read_image, images.read_mask_levels):
            with pytest.raises(UserError, match=f"reference .*{name}:? {reason}"):
                read(tmp_path / name, "reference")
