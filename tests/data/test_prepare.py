"""Data sets that prepare builds, in one run or interrupted, and training on them."""

import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import example_pairs
import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.data import (
    dataset,
    line_record,
    line_store,
    loader,
    manifest,
    prepare,
    report,
)
from focusdpo_jax.errors import UserError

SETTINGS = prepare.Settings(resolution=16)
EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "pairs" / "manifest.jsonl"


def sheet(path, records):
    """A stand-in for the contact sheet that is fast to draw."""
    path.write_text("".join(record["caption"] + "\n" for record in records))


def run(manifest, output, settings=SETTINGS, **options):
    return prepare.prepare(manifest, output, settings, **{"draw_sheet": sheet} | options)


def tree(folder):
    """{path: digest} of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A manifest of six pairs and the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("good")
    manifest = example_pairs.write(folder / "pairs", *example_pairs.make(6))
    return manifest, folder / "output", run(manifest, folder / "output")


def test_records_match_the_manifest(good):
    _, output, told = good
    sources = dataset.open_prepared(output)
    assert {name: len(source) for name, source in sources.items()} == told["splits"]
    assert sum(told["splits"].values()) == 6 and len(told["splits"]) == 3
    lines, _ = example_pairs.make(6)
    records = {
        r["caption"]: r
        for source in sources.values()
        for r in (source[i] for i in range(len(source)))
    }
    assert records.keys() == {line["caption"] for line in lines}
    record = records["thing number 1"]
    assert len(record["subjects"]) == 2
    # 24 x 32 at 2/3: x from 8, less the crop. Masks are two rectangles, 6 to 18 and 8 to 15, 17 to
    # 24, whose middle is that of the image.
    assert record["original_size"].tolist() == [24, 32] and record["crop"].tolist() == [0, 3]
    left = 3 * 1.5
    for j, subject in enumerate(record["subjects"]):
        expected = np.array([8 + 9 * j - left, 6, 15 + 9 * j - left, 18]) / 24
        np.testing.assert_allclose(subject["box"], expected, atol=0.04)
        assert subject["phrase"] == "a thing"
    union = record["subjects"][0]["mask"] | record["subjects"][1]["mask"]
    assert (record["prior_mask"] != union).sum() <= 12  # The seam between the two.
    # Without any mask, everything is where the two differ.
    record = records["thing number 2"]
    np.testing.assert_array_equal(record["subjects"][0]["mask"], record["prior_mask"])
    difference = np.abs(record["chosen"].astype(int) - record["rejected"]).max(-1) > 60
    assert (difference & ~record["prior_mask"]).sum() == 0
    assert 0.1 < record["prior_mask"].mean() < 0.6


def test_batches_have_the_encoder_s_references_and_true_time_ids(good):
    source = dataset.open_prepared(good[1])["train"]
    transform = loader.pair_transform(
        tokenize=lambda caption: np.zeros((2, 5)), num_subjects=2, reference_size=10
    )
    batch = next(loader.evaluation_batches(source, batch_size=2, transform=transform))
    assert batch.references.shape == (2, 2, 10, 10, 3) and batch.truth == {}
    assert batch.reference_masks.shape == (2, 2, 10, 10)
    assert batch.time_ids[0].tolist() == [24, 32, 0, source[0]["crop"][1], 16, 16]
    # 20 x 16 pixels, of which 12 x 10 are marked, in a square of 20 x 20 with white at both sides.
    stored = source[0]["subjects"][0]
    assert stored["reference"].shape == (16, 16, 3)
    assert (stored["reference"][:, [0, -1]] == 255).all()
    assert (stored["reference"][:, 1:-2] < 255).any(-1).mean() > 0.9
    for mask in (stored["reference_mask"], batch.reference_masks[0, 0]):
        assert mask.mean() == pytest.approx(12 * 10 / 20**2, abs=0.08)


def test_report_lists_the_contents(good, tmp_path):
    _, output, told = good
    assert told == json.loads((output / "report.json").read_text())
    assert told["subjects_per_scene"] == {"1": 4, "2": 2} and told["sizes"] == {"24 x 32": 6}
    assert told["duplicates"] == [] and told["refused"] == [] and told["changes"] == {}
    assert told["enlarged"] == 0 and told["status"] == "complete"
    # A mask of 12 x 7 pixels in a square of 24 x 24.
    assert told["subject_area"]["least"] == pytest.approx(12 * 7 / 24**2, rel=0.15)
    assert "6 of 6 lines accepted (" in report.describe(told)
    assert len((output / "contact_sheet.png").read_text().splitlines()) == told["splits"]["train"]


def test_bad_lines_can_be_skipped_and_duplicates_are_reported(tmp_path):
    lines, files = example_pairs.make(6)
    lines[1]["caption"] = ""
    lines = [*lines[:5], b"", lines[0], lines[5]]
    lines[4]["chosen"] = "none.png"
    manifest = example_pairs.write(tmp_path, lines, files)
    with pytest.raises(UserError, match=r"2 of 7 lines are refused; line 2: caption is empty"):
        run(manifest, tmp_path / "output")
    told = run(manifest, tmp_path / "output", skip=True)
    assert [(r["line"], r["field"]) for r in told["refused"]] == [(2, "caption"), (5, "chosen")]
    assert told["accepted"] == 5 and told["duplicates"] == [{"line": 7, "same_as": 1}]
    assert "line 7 repeats 1" in report.describe(told)
    assert sum(map(len, dataset.open_prepared(tmp_path / "output").values())) == 5


class Stop(BaseException):
    """What no `except Exception` catches: leaves everything as a killed process does."""


@pytest.mark.parametrize("where", [0, 2, 5, "build", "sheet", "report", "clean"])
def test_interrupted_and_repeated_is_the_same_to_the_byte(where, good, tmp_path, monkeypatch):
    manifest, expected, _ = good
    work, done = line_store.process_line, []

    def stop(*_, **__):
        raise Stop

    def some(task):
        done.append(task.number)
        return stop() if len(done) > where else work(task)

    def partly(path, *_, **__):
        (path / "incomplete").mkdir(parents=True)
        raise Stop

    with monkeypatch.context() as patch:
        if where == "build":
            patch.setattr(dataset, "build", partly)
        elif where == "report":
            patch.setattr(prepare, "_write_report", stop)
        elif where == "clean":
            patch.setattr(type(manifest), "rmtree", stop, raising=False)
            patch.setattr(type(prepare.epath.Path(".")), "rmtree", stop)
        elif where != "sheet":
            patch.setattr(line_store, "process_line", some)
        with pytest.raises(Stop):
            run(manifest, tmp_path / "output", draw_sheet=stop if where == "sheet" else sheet)
    if where != "clean":
        assert not (tmp_path / "output" / "report.json").exists()
        (tmp_path / "output" / ".work" / "half.zip.tmp").write_bytes(b"half")
        (tmp_path / "output" / "report.json.0123abcd.tmp").write_bytes(b"half")
    with monkeypatch.context() as patch:
        again = []
        patch.setattr(line_store, "make_record", lambda *a: again.append(1) or make_record(*a))
        run(manifest, tmp_path / "output")
    assert len(again) == (6 - where if isinstance(where, int) else 0)
    assert tree(tmp_path / "output") == tree(expected)


make_record = line_store.make_record


def test_worker_processes_give_the_same_data_set(good, tmp_path):
    manifest, expected, _ = good
    run(manifest, tmp_path / "output", workers=2)
    assert tree(tmp_path / "output") == tree(expected)


def test_second_run_changes_nothing_and_detects_changes(good, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(good[0].parent.parent, folder)
    manifest, output = folder / "pairs" / "manifest.jsonl", folder / "output"
    before = tree(output)
    assert run(manifest, output, draw_sheet=None) == good[2]
    assert tree(output) == before
    with pytest.raises(UserError, match="holds another data set"):
        run(manifest, output, prepare.Settings(resolution=24))
    path = folder / "pairs" / "0" / "chosen.png"
    path.write_bytes(example_pairs.encoded(255 - np.asarray(Image.open(path))))
    with pytest.raises(UserError, match="holds another data set"):
        run(manifest, output)
    assert tree(output) == before


def test_other_folders_are_not_changed(good, tmp_path):
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UserError, match="did not make"):
        run(good[0], tmp_path)
    assert list((tmp_path / "pairs").iterdir()) == []


def test_a_difference_that_is_lost_at_the_stored_size_is_refused():
    chosen = np.full((512, 512, 3), 100, np.uint8)
    rejected = chosen.copy()
    rejected[200, 200] = 120
    marked = np.zeros((512, 512), bool)
    marked[150:250, 150:250] = True
    contents = {
        "chosen": chosen,
        "rejected": rejected,
        "subjects[0].reference": chosen,
        "subjects[0].reference_mask": marked,
        "subjects[0].mask": marked,
    }
    contents = {name: example_pairs.encoded(pixels) for name, pixels in contents.items()}
    subject = manifest.PairSubject("reference", "reference_mask", "a thing", "mask", None)
    line = manifest.PairLine("a thing", "chosen", "rejected", (subject,), None, None)
    line_record.make_record(line, contents, line_record.ImageSizes(resolution=512, reference=32))
    with pytest.raises(manifest.LineError, match="differs from chosen, but not at 32 x 32"):
        line_record.make_record(line, contents, line_record.ImageSizes(resolution=32, reference=32))


def test_splits_depend_on_each_group_alone():
    settings = prepare.Settings(validation=0.1, test=0.2)
    groups = {i: f"group {i // 2}" for i in range(4000)}
    splits = prepare.assign_splits(groups, settings)
    assert all(splits[i] == splits[i + 1] for i in range(0, 4000, 2))
    share = {name: list(splits.values()).count(name) / 4000 for name in set(splits.values())}
    assert share["validation"] == pytest.approx(0.1, abs=0.02)
    assert share["test"] == pytest.approx(0.2, abs=0.03)
    fewer = prepare.assign_splits({i: groups[i] for i in range(0, 4000, 3)}, settings)
    assert all(splits[i] == split for i, split in fewer.items())
    # A small set still keeps something to look at; a tiny one is for training.
    small = prepare.assign_splits({0: "a", 1: "b", 2: "c"}, prepare.Settings())
    assert sorted(small.values()) == ["test", "train", "validation"]
    assert set(prepare.assign_splits({0: "a", 1: "b"}, prepare.Settings()).values()) == {"train"}
    # However the hashes fall.
    for validation, test in ((0.3, 0.05), (0.2, 0.2), (0.9, 0.05), (0.5, 0.0)):
        few = prepare.Settings(validation=validation, test=test)
        wanted = {"train", "validation"} | ({"test"} if test else set())
        for i in range(200):
            groups = {j: f"{i} {j}" for j in range(3)}
            assert set(prepare.assign_splits(groups, few).values()) == wanted


def test_tokens_are_counted_by_the_tokenizer_if_given(tmp_path):
    manifest = example_pairs.write(tmp_path, *example_pairs.make())
    with pytest.raises(UserError, match="caption has 78 tokens and CLIP reads 77"):
        run(manifest, tmp_path / "output", count_tokens=lambda caption: 78 if "2" in caption else 7)


def test_training_warns_about_truncated_captions(tiny_config, tmp_path, caplog):
    """Once for all splits of a data set, from the texts alone."""
    from focusdpo_jax.training import builders

    lines, files = example_pairs.make(6)
    for line in lines[:2]:
        line["caption"] = (
            "a ball and a star and a ring and a cross and a heart and a thing on grass"
        )
    run(
        example_pairs.write(tmp_path / "pairs", lines, files),
        tmp_path / "data",
        prepare.Settings(resolution=32),
    )
    source = dataset.open_prepared(tmp_path / "data")["train"]
    assert source.texts() == [
        (record["caption"], [s["phrase"] for s in record["subjects"]])
        for record in (source[i] for i in range(len(source)))
    ]
    config = tiny_config(
        **{"data.source": "prepared", "data.path": str(tmp_path / "data"), "batch_size": 1}
    )
    builders.make_task(config, tmp_path / "run")
    (message,) = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
    assert message.startswith(
        f"config.data.path = '{tmp_path / 'data'}': 1 of 5 texts are longer "
        "than the 16 tokens that the model reads and are cut"
    )
    assert "The model does not read 'a thing'" in message


def test_example_of_the_docs_and_a_run_on_it(tiny_config, tmp_path, monkeypatch):
    """The command as the docs give it, its contact sheet, and two steps of training."""
    import tiny

    from focusdpo_jax.training import loop, models

    output = tmp_path / "data"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "focusdpo_jax.prepare",
            f"--manifest={EXAMPLE}",
            f"--output={output}",
            "--resolution=32",
            "--workers=1",
        ],
        check=True,
        capture_output=True,
    )
    assert Image.open(output / "contact_sheet.png").size[0] > 4 * 160
    sources = dataset.open_prepared(output)
    assert sources["train"].settings["subjects"] == 2

    config = tiny_config(
        **{
            "data.source": "prepared",
            "data.path": str(output),
            "steps": 2,
            "batch_size": 2,
            "evaluation.scenes": 4,
            "focus.buckets": 1,
        }
    )
    loop.run(config, tmp_path / "run")
    losses = tiny.losses(tmp_path / "run")
    assert losses[1] == pytest.approx(np.log(2), abs=1e-4) and np.isfinite(losses[2])
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    assert not (tmp_path / "run" / "results.json").exists()  # Nobody knows the truth.
    assert len(list((output / "encoded_pairs_vit").rglob("*.npz"))) == len(sources["train"])
    loop.run(tiny.changed(config, data__cache=False, data__workers=1), tmp_path / "uncached")
    assert tiny.losses(tmp_path / "uncached")[2] == pytest.approx(losses[2], rel=1e-4)

    # Everything is encoded and nothing is drawn: encoders are not read before they are saved.
    config = tiny.changed(config, evaluation__pictures=0)
    load_parts, read = models.load_parts, []
    monkeypatch.setattr(
        models,
        "load_parts",
        lambda config, parts, *place: (
            read.append(sorted(parts)) or load_parts(config, parts, *place)
        ),
    )
    loop.run(config, tmp_path / "without")
    assert tiny.losses(tmp_path / "without") == losses
    assert read == [
        ["adapter", "unet"],
        ["text_encoder"],
        ["text_encoder_2"],
        ["image_encoder"],
        ["vae"],
    ]
    assert tree(tmp_path / "without" / "model") == tree(tmp_path / "run" / "model")
    assert not (tmp_path / "without" / "samples").exists()
    other = shutil.copytree(config.model.pretrained, tmp_path / "other")
    path = other / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    config = tiny.changed(config, model__pretrained=str(other))
    with pytest.raises(UserError, match="encoded_pairs_vit was made with other vae; remove it"):
        loop.run(config, tmp_path / "refused")

    for changes, reason in [
        # One folder for all: a start that was refused does not stand in the next one's way.
        ({"resolution": 64}, "config.resolution = 64: the images of .* have 32"),
        (
            {"batch_size": 5},
            r"config.batch_size = 5: .* has 4 pairs to train on, and a step takes "
            "config.batch_size = 5 pairs; give config.batch_size = 4 at most, or prepare more pairs",
        ),
        ({"data.path": "nowhere"}, "'nowhere' holds no prepared data set"),
        ({"objective": "probe"}, "learns from Toybox's ground truth"),
    ]:
        config = tiny_config(
            **{
                "data.source": "prepared",
                "data.path": str(output),
                "batch_size": 2,
                "evaluation.scenes": 0,
            }
            | changes
        )
        with pytest.raises(UserError, match=reason):
            loop.run(config, tmp_path / "refused")


# Calls the command once for each set of flags, and prints what it says of each.
CALLS = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from focusdpo_jax import prepare
from focusdpo_jax.errors import UserError
flags.FLAGS(sys.argv[:1])
for values in json.loads(sys.argv[1]):
    with flagsaver.flagsaver(**values):
        try:
            prepare.main()
        except UserError as error:
            print(error)
"""


def test_mistakes_are_named(tmp_path):
    calls = [
        ({}, "give --manifest, or --dreambench"),
        ({"manifest": "a", "dreambench": "b"}, "give --manifest, or --dreambench"),
        ({"manifest": "nowhere/a.jsonl"}, "--manifest=nowhere/a.jsonl cannot be read"),
        ({"dreambench": "nowhere"}, "--dreambench=nowhere is not a folder"),
        ({"manifest": str(EXAMPLE), "resolution": 4}, "--resolution=4"),
        (
            {"manifest": str(EXAMPLE), "resolution": 33},
            "--resolution=33: no model generates squares of that "
            "side; give a multiple of 8, such as 32",
        ),
        ({"manifest": str(EXAMPLE), "validation": 0.7, "test": 0.5}, "nothing is left to train on"),
        ({"manifest": str(EXAMPLE), "max_subjects": 1, "resolution": 64}, "2 entries; give 1 to 1"),
    ]
    flags = [{"output": str(tmp_path / "data"), "workers": 1} | given for given, _ in calls]
    result = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(flags)], check=True, capture_output=True, text=True
    )
    said = iter(result.stdout.splitlines())
    for _, reason in calls:
        assert any(re.search(reason, line) for line in said), reason
