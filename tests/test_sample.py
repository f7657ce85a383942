"""The sample command, with the packaged model and with a run."""

import json
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from focusdpo_jax import sample
from focusdpo_jax.errors import UserError
from focusdpo_jax.training import loop, runs
from focusdpo_jax.training import models as sample_models

if not sample.flags.FLAGS.is_parsed():
    sample.flags.FLAGS(sys.argv[:1])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An image of a red disc on nothing."""
    rows, columns = np.mgrid[-20:20, -20:20]
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[rows**2 + columns**2 < 300] = (255, 0, 0, 255)
    path = tmp_path_factory.mktemp("references") / "disc.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def draw(**values):
    """Runs the command with these flags."""
    with flagsaver.flagsaver(**{"steps": 2, **values}):
        sample.main()


def test_base_generates_one_image_with_its_settings(reference, tmp_path):
    draw(
        prompt="a ball on grass",
        reference=[f"{reference}:a ball"],
        guidance=3.0,
        output=str(tmp_path / "out.png"),
    )
    picture = Image.open(tmp_path / "out.png")
    assert picture.size == (64, 64) and np.asarray(picture).std() > 10
    settings = json.loads(picture.text["focusdpo_jax"])
    assert settings["text"] == "a ball on grass" and settings["guidance"] == 3.0
    assert settings["references"] == [
        {"path": reference, "phrase": "a ball", "box": None, "mask": "", "scale": 1.0}
    ]


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(reference, tmp_path):
    draw(
        prompt="a ball on grass",
        reference=[reference],
        samples=3,
        seed=5,
        guidance=3.0,
        output=str(tmp_path / "three"),
    )
    # The program of the test above, out of the cache.
    draw(
        prompt="a ball on grass",
        reference=[reference],
        seed=6,
        guidance=3.0,
        output=str(tmp_path / "one.png"),
    )
    three = [
        np.asarray(Image.open(tmp_path / "three" / f"{i:04d}.png"), np.int32) for i in range(3)
    ]
    one = np.asarray(Image.open(tmp_path / "one.png"), np.int32)
    assert np.abs(one - three[1]).max() <= 1
    assert np.abs(three[0] - three[1]).mean() > 5
    assert Image.open(tmp_path / "three" / "all.png").size[0] > 256


def test_a_reference_has_a_weight_and_a_region(reference, tiny_folder, tmp_path):
    kept = {"everywhere": "", "box": "@0,0,1,1", "left": "@0,0,0.5,1", "less": "*0"}
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps(
                {"prompt": "a ball on grass", "seed": 5, "references": [f"{reference}:a ball{how}"]}
            )
            + "\n"
            for how in kept.values()
        )
    )
    draw(
        prompt=None,
        prompts=str(tmp_path / "prompts.jsonl"),
        output=str(tmp_path),
        workdir=str(tiny_folder / "model"),
        resolution=32,
        guidance=1.0,
    )
    drawn = dict(
        zip(kept, (np.asarray(Image.open(tmp_path / f"000{i}.png"), np.int32) for i in range(4)))
    )
    # A box of the whole image is none, though another program draws it.
    assert np.abs(drawn["box"] - drawn["everywhere"]).max() <= 2
    assert np.abs(drawn["left"] - drawn["everywhere"]).mean() > 0.5
    assert np.abs(drawn["less"] - drawn["everywhere"]).mean() > 0.5


def test_a_truncated_prompt_is_reported_once(reference, run_folder, tmp_path, caplog):
    """Of the program of the comparison below."""
    long = "a ball and a star and a ring and a cross and a heart and a box on grass"
    draw(
        workdir=str(run_folder),
        prompt=long,
        reference=[f"{reference}:a box"],
        samples=2,
        compare=True,
        output=str(tmp_path),
        negative_prompt="snow " * 15,
    )
    cut = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
    assert len(cut) == 2
    assert cut[0].startswith("--prompt: 1 of 1 texts are longer than the 16 tokens")
    assert "loses 'and a box on grass'. The model does not read 'a box'" in cut[0]
    assert cut[1].startswith("--negative_prompt: 1 of 1") and cut[1].endswith("loses 'snow'")
    assert "--negative_prompt has no effect: guidance is 1.0" in caplog.text


@pytest.fixture(scope="module")
def run_folder(tiny_folder, tmp_path_factory):
    import tiny

    folder = tmp_path_factory.mktemp("run")
    loop.run(tiny.tiny_config(tiny_folder, steps=2), folder)
    return folder


def test_compare_generates_base_and_policy_from_the_same_noise(reference, run_folder, tmp_path):
    draw(
        workdir=str(run_folder),
        prompt="a ball on grass",
        reference=[reference],
        samples=2,
        compare=True,
        output=str(tmp_path),
    )
    first = [np.asarray(Image.open(tmp_path / f"0000{name}.png")) for name in ("", "_base")]
    assert first[0].shape == (32, 32, 3)
    # Two steps of training move an image, and not far.
    difference = np.abs(first[0].astype(int) - first[1])
    assert 0 < difference.mean() < 40


def test_unfinished_run_uses_its_newest_checkpoint(run_folder, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((run_folder / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoint yet"):
        runs.Run(unfinished).policy()
    (unfinished / "checkpoints").symlink_to(run_folder / "checkpoints")
    found, expected = runs.Run(unfinished).policy(), runs.Run(run_folder).policy()
    jax.tree.map(np.testing.assert_array_equal, found.parameters, expected.parameters)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": None}, "give --prompt"),
        ({"prompts": "some.jsonl"}, "give --prompt"),
        ({"reference": ["none.png:a ball"]}, "none.png: no such file"),
        ({"reference": ["none.png:a ball@0,0,1,1.2"]}, "box = "),
        ({"workdir": "nowhere"}, "nowhere"),
        ({"compare": True}, "nothing to compare"),
        ({"resolution": 63}, "multiple of 4"),
        ({"sampler": "plms", "resolution": 64}, "choose one of ddim"),
        ({"samples": 2, "output": __file__}, "is a file; give a folder for 2 images"),
        ({"output": "."}, "is a folder; give the name of an image"),
    ],
)
def test_mistakes_are_named(values, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        draw(**{"prompt": "a ball", "output": str(tmp_path / "out.png")} | values)


@pytest.mark.parametrize("workdir", ["base", "model", "run"])
def test_a_resolution_between_latents_is_refused_before_weights_are_read(
    workdir, run_folder, tiny_folder, tmp_path, monkeypatch
):
    def read(*arguments, **more):
        raise AssertionError("weights were read")

    monkeypatch.setattr(sample_models, "load_parts", read)
    folder = {"base": "base", "model": str(tiny_folder / "model"), "run": str(run_folder)}[workdir]
    with pytest.raises(
        UserError,
        match="--resolution=33: a latent of this model covers 4 pixels in each "
        "direction; give a positive multiple of 4, such as 32",
    ):
        draw(prompt="a ball", workdir=folder, resolution=33, output=str(tmp_path / "out.png"))
