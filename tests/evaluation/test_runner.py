"""Evaluations: interrupted and resumed, of external images, in shares, and compared."""

import html.parser
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import (
    benchmarks,
    comparison,
    runner,
    scoring,
    summaries,
    tables,
)
from focusdpo_jax.evaluation.output_folder import OutputFolder
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.toybox import pretraining
from focusdpo_jax.training import models, run_data

SAMPLING = {"resolution": 32, "steps": 2, "guidance": 1.0, "sampler": "ddim"}
NAN = np.nan


@pytest.fixture(scope="module")
def config(tiny_folder):
    return tiny.tiny_config(tiny_folder, evaluation__scenes=4)


@pytest.fixture(scope="module")
def probe():
    """The probe with random weights, and biases that produce detections."""
    shapes = jax.eval_shape(pretraining.init_probe, jax.random.key(0))
    draw = np.random.default_rng(0)
    probe = jax.tree.map(lambda x: draw.normal(0, 0.05, x.shape).astype(np.float32), shapes)
    probe["heads"]["class"]["bias"][:3] = 1.0
    return probe


@pytest.fixture(scope="module")
def sides(config):
    """A base model, and a policy with slightly different weights."""
    base = models.load_model(config)
    policy = base.with_parameters(jax.tree.map(lambda x: x * 1.05, base.parameters))
    return {"base": lambda: base, "policy": lambda: policy}


def evaluate(path, config, probe, sides, sampling=SAMPLING, **how):
    benchmark = benchmarks.ToyboxBenchmark(
        config, probe, samples=1, seed=0, limit=None, batch_size=2
    )
    return runner.run(OutputFolder(path), benchmark, sides, sampling, batch_size=2, **how)


@pytest.fixture(scope="module")
def whole(config, probe, sides, tmp_path_factory):
    """A folder that was evaluated in one go."""
    path = tmp_path_factory.mktemp("whole")
    evaluate(path, config, probe, sides)
    return path


def test_results(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["settings"]["pictures"] == 4
    for name in ("fidelity", "missing", "background_accuracy"):
        estimates = results["metrics"][name]
        assert estimates.keys() == {"base", "policy", "difference"}
        assert estimates["difference"]["mean"] == pytest.approx(
            estimates["policy"]["mean"] - estimates["base"]["mean"]
        )
        assert estimates["base"]["low"] <= estimates["base"]["mean"] <= estimates["base"]["high"]
    base, policy = (
        np.asarray(Image.open(whole / "pictures" / side / "0001_0.png"), int)
        for side in ("base", "policy")
    )
    assert base.shape == (32, 32, 3) and np.abs(base - policy).max() > 0
    # Beside an evaluation of a run the training's own table is read the same way.
    assert "fidelity ↑" in tables.format_results(results)


def test_scenes_are_those_of_the_runs_test_split(config, probe, tmp_path):
    # Another chance of leaking moves every later draw of a scene's random numbers.
    benchmark = benchmarks.ToyboxBenchmark(
        config, probe, samples=1, seed=0, limit=None, batch_size=2
    )
    scenes = benchmark.scenes(OutputFolder(tmp_path))
    assert len(scenes) == 4
    for scene, record in zip(scenes, run_data.open_data(config)["test"], strict=True):
        assert scene.prompt == record["caption"]
        for subject, expected in zip(scene.subjects, record["subjects"], strict=True):
            np.testing.assert_array_equal(Image.open(subject.reference), expected["reference"])


def test_a_resumed_evaluation_has_the_same_results(
    config, probe, sides, whole, tmp_path, monkeypatch
):
    kept, saved = OutputFolder.save_image, []

    def stop_at_the_sixth(self, side, scene, picture):
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(self.image_path(side, scene))
        kept(self, side, scene, picture)

    monkeypatch.setattr(OutputFolder, "save_image", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, config, probe, sides)
    monkeypatch.setattr(OutputFolder, "save_image", kept)
    written = {path: os.stat(path).st_mtime_ns for path in saved}
    # An image and a score that were being written are no harm.
    (tmp_path / "pictures" / "base" / "0000_0.png.tmp").write_text("half")
    evaluate(tmp_path, config, probe, sides)
    assert {path: os.stat(path).st_mtime_ns for path in saved} == written
    assert (tmp_path / "results.json").read_text() == (whole / "results.json").read_text()
    for path in whole.glob("pictures/*/*.png"):
        assert path.read_bytes() == (tmp_path / path.relative_to(whole)).read_bytes()

    with pytest.raises(UserError, match="holds an evaluation with another sampling"):
        evaluate(tmp_path, config, probe, sides, sampling=SAMPLING | {"steps": 3})
    with pytest.raises(UserError, match="holds an evaluation with another probe"):
        evaluate(tmp_path, config, jax.tree.map(lambda x: 2 * x, probe), sides)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["probe"]  # As in earlier versions, whose probe was another.
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="holds an evaluation with another probe"):
        evaluate(tmp_path, config, probe, sides)


def test_reference_scale(config, probe, sides, whole, tmp_path):
    """Other images, and another folder."""
    evaluate(tmp_path / "half", config, probe, sides, reference_scale=0.5)
    for name in ("base", "policy"):
        [half, full] = [
            np.concatenate([np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))])
            for folder in (tmp_path / "half/pictures" / name, whole / "pictures" / name)
        ]
        assert half.shape == full.shape and np.any(half != full)
    with pytest.raises(UserError, match="another sampling"):
        evaluate(tmp_path / "half", config, probe, sides)
    shutil.copytree(whole, tmp_path / "whole")
    with pytest.raises(UserError, match="another sampling"):
        evaluate(tmp_path / "whole", config, probe, sides, reference_scale=0.5)


def test_shares_add_up(config, probe, sides, whole, tmp_path):
    assert evaluate(tmp_path, config, probe, sides, share=(1, 2)) is None
    assert {path.name for path in tmp_path.glob("pictures/base/*.png")} == {
        "0002_0.png",
        "0003_0.png",
    }
    assert not (tmp_path / "results.json").exists()
    evaluate(tmp_path, config, probe, sides, share=(0, 2))
    assert (tmp_path / "results.json").read_text() == (whole / "results.json").read_text()


def test_truncated_prompts_are_reported_once(sides, tmp_path, caplog):
    """Of both sides together; a benchmark of two scenes in which nothing is found."""
    Image.new("RGB", (8, 8)).save(tmp_path / "box.png")
    box = BenchmarkSubject("box", "a box", str(tmp_path / "box.png"))
    long = "a ball and a star and a ring and a cross and a heart and a box on grass"

    class TwoScenes:
        settings, region_scorer, about = {"seed": 0}, None, "Two scenes."
        scorers = [scoring.MissingScorer("nothing")]

        def scenes(self, folder):
            return [
                BenchmarkScene("a", long, (box, box), 0, "a"),
                BenchmarkScene("b", "a box", (box,), 1, "b"),
            ]

    runner.run(OutputFolder(tmp_path / "out"), TwoScenes(), sides, SAMPLING, batch_size=2)
    (message,) = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
    assert message.startswith("the scenes: 1 of 2 texts are longer than the 16 tokens")
    assert "The model does not read 'a box'" in message


def test_images_of_another_program(config, probe, whole, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(UserError, match="lacks 4 of 4 images, such as 0000_0.png"):
        evaluate(tmp_path / "out", config, probe, {}, images=images)
    for path in (whole / "pictures" / "policy").iterdir():
        Image.open(path).save(images / path.name)
    results = evaluate(tmp_path / "out", config, probe, {}, images=images)
    expected = json.loads((whole / "results.json").read_text())["metrics"]
    assert results["metrics"] == {
        name: {"policy": estimates["policy"]}
        for name, estimates in expected.items()
        if estimates["policy"]["n"]
    }
    Image.new("RGB", (32, 32)).save(images / "0000_0.png")
    with pytest.raises(UserError, match="another digest of images"):
        evaluate(tmp_path / "out", config, probe, {}, images=images)
    # A folder of generated images keeps its scores for those, also one of an earlier version.
    shutil.copytree(whole, tmp_path / "generated")
    for settings in (None, json.loads((whole / "settings.json").read_text())):
        if settings is not None:
            assert settings.pop("source of images") == "a model"
            (tmp_path / "generated" / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="another source of images"):
            evaluate(tmp_path / "generated", config, probe, {}, images=images)
    Image.new("RGB", (48, 32)).save(images / "0000_0.png")
    with pytest.raises(UserError, match="scene 0000_0 has 48 x 32 pixels .* reads 32 x 32"):
        evaluate(tmp_path / "large", config, probe, {}, images=images)


def test_compare(whole, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(whole, other)
    results = json.loads((other / "results.json").read_text())
    del results["settings"]["scores"]["policy"]  # As of an evaluation of the base alone.
    (other / "results.json").write_text(json.dumps(results))
    compared = comparison.compare([whole, other])
    assert [column["side"] for column in compared["columns"]] == ["policy", "base"]
    expected, found = results["metrics"]["missing"], compared["metrics"]["missing"]
    assert found["estimates"] == [expected["policy"], expected["base"]]
    # The other way round than policy minus base.
    assert found["differences"][0]["mean"] == pytest.approx(-expected["difference"]["mean"])
    text = comparison.format_comparison(compared)
    assert text.startswith("4 scenes") and f"{other} - {whole}" in text
    with pytest.raises(UserError, match="two or more"):
        comparison.compare([whole])
    results["settings"]["protocol"] = "one"
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"another protocol \(one\) than .* \(None\)"):
        comparison.compare([whole, other])
    del results["settings"]["protocol"]
    results["settings"]["probe"] = "other"
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"another probe \(other\) than"):
        comparison.compare([whole, other])
    with pytest.raises(UserError, match="cannot be read"):
        comparison.compare([whole, tmp_path / "nowhere"])


def scene(name, group, *subjects):
    return BenchmarkScene(name, "", tuple(BenchmarkSubject(s, s, "") for s in subjects), 0, group)


def test_values_are_grouped_and_padded():
    scenes = [scene("a", "x", "1"), scene("b", "y", "1", "2"), scene("c", "x", "1")]
    scores = {"a": {"m": 1.0}, "b": {"m": [2.0, None]}, "c": {"m": 3.0, "n": 5.0}}
    found = summaries.values_by_group(scenes, scores)
    np.testing.assert_array_equal(found["m"], [[1, 3], [2, NAN]])
    np.testing.assert_array_equal(found["n"], [[NAN, 5], [NAN, NAN]])


class Checker(html.parser.HTMLParser):
    """Every element is closed, in order; collects tags and what they refer to."""

    EMPTY = {"meta", "img", "rect", "path"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_self_contained(whole, config, probe, sides, tmp_path):
    run = tmp_path / "a <run>"
    (run / "samples").mkdir(parents=True)
    Image.new("RGB", (300, 200)).save(run / "samples" / "step_000012.png")
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": 1 / step, "t0/loss": 3.0}) + "\n"
            for step in (1, 2, 3)
        )
        + '{"step": 4, "lo'
    )
    # As if the first evaluation had been of this run; the policy gains in one scene and loses in
    # another.
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    fidelity = {
        ("base", "0001_0"): 0.25,
        ("policy", "0001_0"): 0.75,
        ("base", "0002_0"): 1.0,
        ("policy", "0002_0"): 0.5,
    }
    for path in (tmp_path / "out").glob("scores/*/*/*.json"):
        scores = json.loads(path.read_text())
        for name, measured in scores.items():
            value = fidelity.get((path.parent.parent.name, name), 0.0)
            measured["fidelity"] = [value] + [None] * (len(measured["fidelity"]) - 1)
        path.write_text(json.dumps(scores))
    evaluate(tmp_path / "out", config, probe, sides, workdir=run, cases=1)
    text = (tmp_path / "out" / "report.html").read_text()
    checked = Checker(text)
    assert "script" not in checked.tags and "link" not in checked.tags
    assert all(source.startswith("data:image/") for source in checked.sources)
    assert not re.search(r"https?://|url\(", text)
    gained, lost = text.split("Where the policy loses most")
    assert "base: 25.0 %" in gained and "policy: 75.0 %" in gained and "0001_0" in gained
    assert "base: 100.0 %" in lost and "policy: 50.0 %" in lost and "0002_0" in lost
    # Base, policy and references of both; then the run's page.
    assert 7 <= len(checked.sources) <= 11
    assert "a &lt;run&gt;" in text and "Step 12: scenes" in text
    assert "loss from step 1 to 3" in text and "t0/loss" not in text
