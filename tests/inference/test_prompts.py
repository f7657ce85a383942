"""Parsing of prompts, and loading of reference images and masks."""

import json

import example_pairs
import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.data.images import decode_image
from focusdpo_jax.errors import UserError
from focusdpo_jax.inference import prompts
from focusdpo_jax.inference.prompts import Prompt, Reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png:a red star", Reference("a.png", "a red star")),
        ("a.png", Reference("a.png")),
        ("gs://bucket/a.png", Reference("gs://bucket/a.png")),
        ("gs://bucket/a.png:a star", Reference("gs://bucket/a.png", "a star")),
        ("a.png:a star@0,0.5,.5,1*0.8", Reference("a.png", "a star", (0, 0.5, 0.5, 1), scale=0.8)),
        ("a.png@0,0,1,1", Reference("a.png", box=(0, 0, 1, 1))),
        ("a@b.png:a star@m.png", Reference("a@b.png", "a star", mask="m.png")),
        ("photos@home/a.png", Reference("photos@home/a.png")),
        ("a.png*2", Reference("a.png", scale=2.0)),
    ],
)
def test_last_colon_divides_path_and_phrase(text, expected):
    assert prompts.parse_reference(text) == expected


def test_file_gives_prompts_with_references_beside_it(tmp_path):
    lines = [
        {"prompt": "a star", "references": ["star.png:a star"], "seed": 40},
        {"prompt": "a ball"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    default = (Reference("given.png"),)
    assert prompts.read_prompts(path, default, seed=7) == [
        Prompt("a star", (Reference(str(tmp_path / "star.png"), "a star"),), 40),
        Prompt("a ball", default, 8),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "line 2"),
        ('{"text": "a"}', "unknown key 'text'"),
        ('{"seed": 1}', "lacks 'prompt'"),
        ('{"prompt": 3}', "prompt must be a text"),
        ("[1]", "line 2"),
        ('{"prompt": "a", "references": [3]}', "line 2"),
    ],
)
def test_bad_line_is_named(line, reason, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(UserError, match="line 2") as error:
        prompts.read_prompts(path)
    assert reason in str(error.value)


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="no line"):
        prompts.read_prompts(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot be read"):
        prompts.read_prompts(tmp_path / "none")


def test_reference_is_padded_upright_and_on_white(tmp_path):
    # 4 x 2 pixels, red above and clear below, said to be turned by 180 degrees.
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[0] = (255, 0, 0, 255)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(tmp_path / "a.png", exif=exif)
    loaded = prompts.load_reference(tmp_path / "a.png", 4)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded[[0, 1, 3]], np.full((3, 4, 3), 255))
    np.testing.assert_array_equal(loaded[2], np.tile([255, 0, 0], (4, 1)))


def test_bad_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:5000])
    for name, reason in (
        ("none", "no such file"),
        ("text", "is not an image in PNG"),
        ("half", "is truncated"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            prompts.load_reference(tmp_path / f"{name}.png", 64)
        assert name in str(error.value)


def test_references_and_masks_are_read_as_prepare_reads(tmp_path):
    """Earlier versions decoded 16 bits as white, floats as black, and ignored a cut-out's alpha."""
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(grey).save(tmp_path / name)
        loaded = prompts.load_reference(tmp_path / name, 8)
        np.testing.assert_array_equal(loaded[..., 0], np.rint(grey / 257))
        place = prompts.load_region_mask(Reference("a.png", mask=str(tmp_path / name)), 8)
        np.testing.assert_array_equal(place, np.float32(np.rint(grey / 257)) / 255)
    profile = example_pairs.rgb_profile(*example_pairs.ADOBE_RGB)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "adobe.png").write_bytes(example_pairs.encoded(pixels, icc_profile=profile))
    np.testing.assert_array_equal(
        prompts.load_reference(tmp_path / "adobe.png", 8),
        decode_image(example_pairs.encoded(pixels, icc_profile=profile))[0],
    )
    Image.fromarray(np.float32(grey) / 65535).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"reference .*float.tiff has 32 bits per channel"):
        prompts.load_reference(tmp_path / "float.tiff", 8)
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:5, 3:7] = 255
    Image.fromarray(np.dstack([np.zeros_like(pixels), alpha])).save(tmp_path / "cut.png")
    place = prompts.load_region_mask(Reference("a.png", mask=str(tmp_path / "cut.png")), 8)
    np.testing.assert_array_equal(place, alpha / np.float32(255))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.png:a star@0,0,2,1", "0 <= x0 < x1 <= 1"),
        ("a.png:a star@0.5,0,0.5,1", "0 <= x0 < x1 <= 1"),
        ("a.png:a star@0,0,1", "give x0,y0,x1,y1"),
        ("a.png:a star*-1", "scale = -1.0"),
    ],
)
def test_bad_regions_and_scales_are_named(text, reason):
    with pytest.raises(UserError, match="reference a.png") as error:
        prompts.parse_reference(text)
    assert reason in str(error.value)


def test_file_gives_references_as_objects(tmp_path):
    path = tmp_path / "prompts.jsonl"
    entry = {"path": "star.png", "phrase": "a star", "mask": "left.png", "scale": 0.5}
    path.write_text(json.dumps({"prompt": "a star", "references": [entry]}))
    assert prompts.read_prompts(path)[0].references == (
        Reference(str(tmp_path / "star.png"), "a star", mask=str(tmp_path / "left.png"), scale=0.5),
    )
    for wrong, reason in (
        (entry | {"weight": 1}, "unknown key 'weight'"),
        (entry | {"box": [0, 0, 1, 1]}, "a box or a mask"),
        (entry | {"mask": "", "box": [1, 0]}, "give x0,y0,x1,y1"),
    ):
        path.write_text(json.dumps({"prompt": "a star", "references": [wrong]}))
        with pytest.raises(UserError, match=f"line 1: .*{reason}"):
            prompts.read_prompts(path)


def test_region_masks(tmp_path):
    box = prompts.load_region_mask(Reference("a.png", box=(0.25, 0, 1, 0.5)), 8)
    expected = np.zeros((8, 8))
    expected[:4, 2:] = 1
    np.testing.assert_array_equal(box, expected)
    assert prompts.load_region_mask(Reference("a.png"), 4).all()
    Image.fromarray(np.uint8(expected * 255)).save(tmp_path / "mask.png")
    mask = Reference("a.png", mask=str(tmp_path / "mask.png"))
    np.testing.assert_array_equal(prompts.load_region_mask(mask, 8), expected)
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="dark everywhere"):
        prompts.load_region_mask(mask, 8)
