"""Pairs from photographs in DreamBench's layout: their partners and masks."""

import json

import example_pairs
import numpy as np
import pytest
from shared import shared

from focusdpo_jax.data import dreambench, prepare
from focusdpo_jax.data.images import decode_image, decode_mask
from focusdpo_jax.errors import UserError

COLORS = {"dog": (200, 40, 40), "dog2": (40, 40, 200), "soup_can": (120, 120, 120)}


@pytest.fixture
def folder(tmp_path):
    """Three subjects of two photographs each: an even square on an uneven background."""
    draw = np.random.default_rng(0)
    for subject, color in COLORS.items():
        for i in range(2):
            picture = draw.integers(90, 130, (48, 40, 3), np.uint8)
            mask = np.zeros((48, 40), bool)
            mask[16:32, 8 + 8 * i : 24 + 8 * i] = True
            picture[mask] = color
            path = tmp_path / "photos" / subject / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(example_pairs.encoded(picture))
            path.with_name(f"{i:02d}_mask.png").write_bytes(example_pairs.encoded(mask))
    (tmp_path / "photos" / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ndog,dog\ndog2,dog\n\nPrompts\n"
    )
    return tmp_path / "photos"


def read(folder, name):
    return (folder / name).read_bytes()


def test_pairs_of_photographs(folder, tmp_path):
    manifest = dreambench.write_manifest(folder, tmp_path / "source")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    kinds = [(line["group"], line["info"]["kind"]) for line in lines]
    assert kinds == [
        *[("dog", "photograph"), ("dog", "composite")] * 2,
        *[("dog2", "photograph"), ("dog2", "composite")] * 2,
        *[("soup_can", "composite")] * 2,
    ]
    assert [line["caption"] for line in lines[::4]] == [
        "a photo of a dog",
        "a photo of a dog",
        "a photo of a soup can",
    ]
    for line in lines:
        source, subject = tmp_path / "source", line["subjects"][0]
        assert line["chosen"] != subject["reference"]
        assert line["chosen"].split("/")[0] == subject["reference"].split("/")[0] == line["group"]
        chosen = decode_image(read(source, line["chosen"]))[0].astype(int)
        rejected = decode_image(read(source, line["rejected"]))[0].astype(int)
        mask = decode_mask(read(source, subject["mask"]))
        prior = decode_mask(read(source, line["prior_mask"]))
        assert chosen[mask].mean(0) == pytest.approx(COLORS[line["group"]])
        middle = int(np.flatnonzero(mask.any(0)).mean())
        middle = rejected[22:26, middle - 2 : middle + 3].reshape(-1, 3).mean(0)
        if line["group"] == "soup_can":  # Grey has no opposite: it becomes red.
            assert middle[0] > middle[1] + 60
        else:
            other = "dog2" if line["group"] == "dog" else "dog"
            assert middle == pytest.approx(COLORS[other], abs=3)
        if line["info"]["kind"] == "composite":
            np.testing.assert_array_equal(rejected[~prior], chosen[~prior])
            assert mask.sum() < prior.sum() < 0.6 * prior.size and prior[mask].all()
        else:
            assert prior.all()


def test_they_pass_every_check(folder, tmp_path, monkeypatch):
    manifest = dreambench.write_manifest(folder, tmp_path / "source")
    monkeypatch.setattr(prepare, "_build", lambda *_: None)
    report = prepare.prepare(
        manifest, tmp_path / "output", prepare.Settings(resolution=32), draw_sheet=None
    )
    assert report["accepted"] == report["lines"] == 10


def test_photographs_without_masks_are_named(folder, tmp_path):
    for path in folder.rglob("*_mask.png"):
        path.unlink()
    with pytest.raises(UserError, match="no folder with two photographs and their masks"):
        dreambench.write_manifest(folder, tmp_path / "source")


def test_a_folder_without_a_name_is_a_subject():
    assert dreambench.classes("", ["01", "dog2", "red_cat"]) == {
        "01": "subject",
        "dog2": "dog",
        "red_cat": "red cat",
    }


def test_real_photographs(tmp_path):
    """Of two subjects, so that it is quick; the whole folder goes the same way."""
    for subject in ("dog", "dog2"):
        (tmp_path / "photos" / subject).mkdir(parents=True)
        for path in sorted(shared(f"dreambench/{subject}").iterdir())[:4]:
            (tmp_path / "photos" / subject / path.name).write_bytes(path.read_bytes())
    manifest = dreambench.write_manifest(tmp_path / "photos", tmp_path / "source")
    assert len(manifest.read_text().splitlines()) == 8
    composite = decode_image(read(tmp_path / "source", "dog/00_composite.png"))[0].astype(int)
    chosen = decode_image(read(tmp_path / "source", "dog/00.jpg"))[0]
    prior = decode_mask(read(tmp_path / "source", "dog/00_prior.png"))
    mask = decode_mask(read(tmp_path / "source", "dog/00_mask.png"))
    np.testing.assert_array_equal(composite[~prior], chosen[~prior])
    assert np.abs(composite - chosen)[mask].mean() > 30
