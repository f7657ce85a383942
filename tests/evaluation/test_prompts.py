"""Prompts and reference pictures as users give them."""

import json

import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import prompts
from focusdpo_jax.evaluation.prompts import Prompt, Reference


@pytest.mark.parametrize(("text", "expected"), [
    ("a.png:a red star", Reference("a.png", "a red star")),
    ("a.png", Reference("a.png")),
    ("gs://bucket/a.png", Reference("gs://bucket/a.png")),
    ("gs://bucket/a.png:a star", Reference("gs://bucket/a.png", "a star")),
])
def test_last_colon_divides_path_and_phrase(text, expected):
    assert prompts.parse_reference(text) == expected


def test_file_gives_prompts_with_references_beside_it(tmp_path):
    lines = [{"prompt": "a star", "references": ["star.png:a star"], "seed": 40},
             {"prompt": "a ball"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    default = (Reference("given.png"),)
    assert prompts.read_prompts(path, default, seed=7) == [
        Prompt("a star", (Reference(str(tmp_path / "star.png"), "a star"),), 40),
        Prompt("a ball", default, 8)]


@pytest.mark.parametrize(("line", "reason"), [
    ('{"prompt": "a"', "line 2"),
    ('{"text": "a"}', "unknown key 'text'"),
    ('{"seed": 1}', "lacks 'prompt'"),
    ('{"prompt": 3}', "prompt must be a text"),
    ("[1]", "line 2"),
    ('{"prompt": "a", "references": [3]}', "line 2"),
])
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


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:5000])
    for name, reason in (("none", "no such file"), ("text", "cannot be read"),
                         ("half", "cannot be read")):
        with pytest.raises(UserError, match=reason) as error:
            prompts.load_reference(tmp_path / f"{name}.png", 64)
        assert name in str(error.value)
