"""Pairs that disrupt makes: in one run or interrupted, and independent of other scenes."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from example_pairs import encoded, write
from PIL import Image

from focusdpo_jax.data import manifest, prepare, scene_manifest
from focusdpo_jax.data.images import decode_image, decode_mask
from focusdpo_jax.disruption import runner, selection
from focusdpo_jax.disruption.inpainting import Inpainter
from focusdpo_jax.errors import UserError
from focusdpo_jax.training import runs
from focusdpo_jax.visualization import contact_sheet
from tests.data.test_prepare import tree
from tests.disruption import example_scenes

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "pairs" / "scenes.jsonl"
SETTINGS = runner.Settings(candidates=3, resolution=32, steps=2, strength=1.0, batch_size=2)


class Counted:
    """An Inpainter that counts its images, and can stop before one of them."""

    def __init__(self, inpainter):
        self._inpainter, self.drawn, self.stop_at = inpainter, [], None

    def draw(self, picture, mask, phrase, seeds, reference=None):
        if len(self.drawn) == self.stop_at:
            raise KeyboardInterrupt
        self.drawn.append((phrase, reference))
        return self._inpainter.draw(picture, mask, phrase, seeds, reference)


@pytest.fixture(scope="module")
def artist(tiny_folder):
    """(inpainter, scorer, tokenizer) of the tiny model."""
    model = runs.load_folder(tiny_folder / "model")
    return (
        Inpainter(model, **SETTINGS.inpainting()),
        selection.CandidateScorer(selection.patch_encoder(model, 2)),
        model.tokenizer,
    )


@pytest.fixture
def run(artist):
    """run(manifest, output, settings, **options); run.artist.drawn has the inpainted images."""
    inpainter, scorer, tokenizer = artist
    counted = Counted(inpainter)

    def start(manifest, output, settings=SETTINGS, **options):
        return runner.disrupt(
            manifest,
            output,
            settings,
            counted,
            scorer,
            identity={"model": "tiny"},
            draw_sheet=contact_sheet.draw,
            count_tokens=lambda text: (tokenizer.count(text), tokenizer.length),
            **options,
        )

    start.artist = counted
    return start


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write(tmp_path_factory.mktemp("scenes"), *example_scenes.make())


@pytest.fixture(scope="module")
def good(artist, scenes, tmp_path_factory):
    """The output folder of an uninterrupted run."""
    inpainter, scorer, tokenizer = artist
    output = tmp_path_factory.mktemp("good") / "pairs"
    runner.disrupt(
        scenes,
        output,
        SETTINGS,
        inpainter,
        scorer,
        identity={"model": "tiny"},
        draw_sheet=contact_sheet.draw,
        count_tokens=lambda text: (tokenizer.count(text), tokenizer.length),
    )
    return output


def pairs(output):
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def picture(output, name):
    return decode_image((output / name).read_bytes())[0]


def test_only_what_is_inside_the_masks_changes(good):
    for pair in pairs(good):
        chosen, rejected = (picture(good, pair[name]) for name in ("chosen", "rejected"))
        masks = [decode_mask((good / s["mask"]).read_bytes()) for s in pair["subjects"]]
        union = np.any(masks, axis=0)
        np.testing.assert_array_equal(chosen[~union], rejected[~union])
        np.testing.assert_array_equal(decode_mask((good / pair["prior_mask"]).read_bytes()), union)
        for mask in masks:
            assert np.abs(chosen.astype(int) - rejected)[mask].mean() > 5


def test_the_manifest_records_how_each_subject_was_made(good):
    first = pairs(good)[0]
    assert (first["group"], first["info"]) == ("the ball", [1, 2])
    info = first["subjects"][0]["info"]
    assert info["from"] == "a test"
    told = info["disruption"]
    assert (told["mode"], told["strength"]) == ("phrase", 1.0)
    assert len({c["seed"] for c in told["candidates"]}) == 3
    best = selection.select_candidate(
        [c["instance_similarity"] for c in told["candidates"]],
        [c["caption_similarity"] for c in told["candidates"]],
    )
    assert {**told, **told["candidates"][best]} == told


def test_prepare_takes_the_manifest_as_it_is(good, tmp_path):
    report = prepare.prepare(
        good / "manifest.jsonl",
        tmp_path / "data",
        prepare.Settings(resolution=32, validation=0),
        draw_sheet=contact_sheet.draw,
    )
    assert (report["accepted"], report["refused"]) == (3, [])
    # The cut-out of the third scene's subject is its reference.
    last = pairs(good)[2]["subjects"][0]
    cut = picture(good, last["reference"])
    marked = decode_mask((good / last["reference_mask"]).read_bytes())
    assert marked.sum() == 16 * 17 and (cut[~marked] == 255).all()


def test_a_scene_does_not_depend_on_the_other_scenes(run, good, tmp_path):
    lines, files = example_scenes.make()
    run(write(tmp_path / "one", lines[1:2], files), tmp_path / "pairs")
    alone = tree(tmp_path / "pairs" / "scenes" / "000001")
    company = tree(good / "scenes" / "000002")
    alone.pop("line.json"), company.pop("line.json")  # They name their folders.
    assert alone == company


@pytest.mark.parametrize("stop_at", [0, 2, 3])
def test_an_interrupted_run_resumes_to_the_same_result(run, scenes, good, tmp_path, stop_at):
    output = tmp_path / "pairs"
    run.artist.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        run(scenes, output)
    run.artist.stop_at = None
    half = output / "scenes" / "000003"
    half.mkdir(parents=True)  # What a kill leaves: the images of a scene without its line.
    (half / "rejected.png").write_bytes(b"half")
    (half / "mask0.png.1234abcd.tmp").write_bytes(b"half")
    (output / "report.json.1234abcd.tmp").write_bytes(b"half")
    run(scenes, output)
    assert tree(output) == tree(good)
    done = len(run.artist.drawn)
    assert done <= 5  # Four subjects, of which one scene's may have been drawn twice.
    run(scenes, output)
    assert len(run.artist.drawn) == done and tree(output) == tree(good)


def test_only_a_changed_scene_is_inpainted_again(run, good, tmp_path):
    lines, files = example_scenes.make()
    shutil.copytree(good, tmp_path / "pairs")
    files["0.png"] = encoded(Image.fromarray(np.full((40, 52, 3), 90, np.uint8)))
    run(write(tmp_path / "changed", lines[:2], files), tmp_path / "pairs")
    assert [phrase for phrase, _ in run.artist.drawn] == ["a ball"]
    now, before = tree(tmp_path / "pairs" / "scenes"), tree(good / "scenes")
    assert not any(name.startswith("000003") for name in now)
    assert now["000001/rejected.png"] != before["000001/rejected.png"]
    assert now["000002/rejected.png"] == before["000002/rejected.png"]


def test_a_leak_has_the_looks_of_another_subject_of_its_scene(run, scenes, tmp_path):
    lines, files = example_scenes.make()
    settings = dataclasses.replace(SETTINGS, mode="leak")
    run(write(tmp_path / "two", lines[1:2], files), tmp_path / "pairs", settings)
    told = [s["info"]["disruption"] for s in pairs(tmp_path / "pairs")[0]["subjects"]]
    assert [t["donor"] for t in told] == [1, 0]
    for (_, reference), donor in zip(run.artist.drawn, (1, 0)):
        np.testing.assert_array_equal(reference, decode_image(files[f"1_{donor}.png"])[0])
    with pytest.raises(UserError, match="line 1: subjects has 1 entry and --mode=leak needs"):
        run(scenes, tmp_path / "others", settings)


def test_a_folder_of_other_files_is_not_changed(run, scenes, good, tmp_path):
    with pytest.raises(UserError, match="holds pairs with another seed, strength; give another"):
        run(scenes, good, dataclasses.replace(SETTINGS, seed=1, strength=0.5))
    (tmp_path / "manifest.jsonl").write_text("mine")
    with pytest.raises(UserError, match="has a manifest.jsonl that `disrupt` did not make"):
        run(scenes, tmp_path)
    assert (tmp_path / "manifest.jsonl").read_text() == "mine"


def changed(change):
    """The first scene after `change(line, its subject, files)`."""
    lines, files = example_scenes.make()
    change(lines[0], lines[0]["subjects"][0], files)
    return lines, files


REFUSED = {
    "chosen = 'gone.png': no such file": lambda line, s, f: line.update(chosen="gone.png"),
    r"subjects\[0\].mask is 9 x 9 pixels and chosen is 40 x 52; give both one size": lambda line, s, f: (
        f.update({"0_0_mask.png": encoded(np.ones((9, 9), bool))})
    ),
    r"subjects\[0\].mask is empty; make": lambda line, s, f: f.update(
        {"0_0_mask.png": encoded(np.zeros((40, 52), bool))}
    ),
    r"subjects\[0\].mask is missing; give the file of a mask, a box, or a --segmenter": lambda line, s, f: (
        s.pop("mask")
    ),
    r"subjects\[0\].mask is 50 pixels long and the shorter side of chosen 40; crop": lambda line, s, f: (
        f.update({"0_0_mask.png": encoded(np.broadcast_to(np.arange(52) < 50, (40, 52)))})
    ),
    r"subjects\[0\].phrase is missing; name the subject, as in 'a dog', or give a --captioner": lambda line, s, f: (
        s.pop("phrase")
    ),
    r"subjects\[0\].phrase = 'a blue tent' has no word in common with the caption": lambda line, s, f: (
        s.update(phrase="a blue tent")
    ),
    r"subjects\[0\].phrase has 25 tokens and the model reads 16; shorten it": lambda line, s, f: (
        s.update(phrase="a ball with extraordinary ears")
    ),
    r"subjects\[0\].reference is missing, but there is a reference_mask": lambda line, s, f: s.pop(
        "reference"
    ),
    r"rejected is not a field; put your own data in info": lambda line, s, f: line.update(
        rejected="0.png"
    ),
    "caption is missing; describe the image": lambda line, s, f: line.pop("caption"),
    "chosen is 7 x 52 pixels, too small for 32; give at least 8": lambda line, s, f: f.update(
        {
            "0.png": encoded(np.zeros((7, 52, 3), np.uint8)),
            "0_0_mask.png": encoded(np.ones((7, 52), bool)),
        }
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unusable_lines_are_refused_before_inpainting(run, tmp_path, reason):
    path = write(tmp_path, *changed(REFUSED[reason]))
    with pytest.raises(UserError, match="^1 of 3 lines are refused; line 1: " + reason):
        run(path, tmp_path / "pairs")
    report = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert report["status"] == "refused" and report["refused"][0]["line"] == 1
    assert not run.artist.drawn


def test_refused_lines_can_be_left_out(run, good, tmp_path):
    path = write(tmp_path, *changed(lambda line, s, f: line.pop("caption")))
    report = run(path, tmp_path / "pairs", skip=True)
    assert (report["scenes"], report["lines"], len(report["refused"])) == (2, 3, 1)
    assert pairs(tmp_path / "pairs") == pairs(good)[1:]


def test_the_example_of_the_documentation_runs():
    for _, text in manifest.read_lines(EXAMPLE):
        line = scene_manifest.parse_line(text, max_subjects=3, hooks=scene_manifest.Hooks())
        scene_manifest.load_scene(
            line,
            {
                field: manifest.read_file(EXAMPLE.parent, name, field)
                for field, name in line.files().items()
            },
            64,
        )


def test_hooks_fill_in_what_is_missing(run, tmp_path):
    def bare(line, subject, files):
        del line["caption"], subject["phrase"], subject["reference_mask"]
        second = {"phrase": "a star", "box": [0.5, 0.25, 0.75, 0.75]}
        line["subjects"].append(second)

    asked = []

    def segment(pixels, phrase, box):
        asked.append((pixels.shape, phrase, box))
        mask = np.zeros(pixels.shape[:2], bool)
        mask[4:14, 5:15] = True
        return mask

    def describe(pixels, mask):
        return "a star and a ball" if mask.all() else "a red ball"

    lines, files = changed(bare)
    path = write(tmp_path, lines[:1], files)
    run(path, tmp_path / "pairs", hooks=scene_manifest.Hooks(segment, describe))
    pair = pairs(tmp_path / "pairs")[0]
    assert pair["caption"] == "a star and a ball"
    assert [s["phrase"] for s in pair["subjects"]] == ["a red ball", "a star"]
    assert asked == [
        ((20, 16, 3), "a red ball", None),
        ((40, 52, 3), "a star", (0.5, 0.25, 0.75, 0.75)),
    ]
    for i, name in ((0, "reference_mask"), (1, "mask")):
        found = tmp_path / "pairs" / pair["subjects"][i][name]
        assert decode_mask(found.read_bytes()).sum() == 100

    with pytest.raises(UserError, match=r"subjects\[1\].mask by --segmenter is empty: it finds no"):
        run(
            path,
            tmp_path / "empty",
            hooks=scene_manifest.Hooks(
                lambda pixels, phrase, box: segment(pixels, phrase, box) & (phrase != "a star"),
                describe,
            ),
        )
    with pytest.raises(UserError, match=r"subjects\[0\].phrase by --captioner is ''; it has to"):
        run(path, tmp_path / "silent", hooks=scene_manifest.Hooks(segment, lambda *_: ""))


class Colours:
    """An encoder that sees the mean colour of what is not white."""

    name, digest = "colours", "1"

    def __call__(self, pictures):
        means = np.stack([p[(p < 255).any(-1)].mean(0) for p in pictures])
        return means / np.linalg.norm(means, axis=-1, keepdims=True)


def test_candidates_are_compared_with_the_subject_and_with_their_phrase():
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:20] = True

    def coloured(*colour):
        picture = np.full((20, 30, 3), 77, np.uint8)
        picture[mask] = colour
        return picture

    red, green, both = coloured(200, 0, 0), coloured(0, 200, 0), coloured(140, 140, 0)
    asked = mask, "green", [1.0, 2.0, 3.0]
    alike, fit = selection.CandidateScorer(Colours()).scores(red, [red, green, both], *asked)
    np.testing.assert_allclose(alike, [1, 0, np.sqrt(0.5)], atol=1e-6)  # The grey does not count.
    assert fit.tolist() == [1.0, 2.0, 3.0]
    clip = Colours(), lambda prompts: np.float32([[0, 1, 0]] * len(prompts))
    scorer = selection.CandidateScorer(Colours(), clip)
    _, fit = scorer.scores(red, [red, green, both], *asked)
    np.testing.assert_allclose(fit, [0, 1, np.sqrt(0.5)], atol=1e-6)
    assert scorer.name == {"instance_similarity": "colours 1", "caption_similarity": "clip 1"}


def test_the_best_match_among_the_least_similar_is_selected():
    alike, fit = [0.9, 0.2, 0.5, 0.4], [3.0, 1.0, 2.0, 1.5]
    assert (
        selection.select_candidate(alike, fit) == 2
    )  # The first fits best, but is the subject itself.
    assert selection.select_candidate(alike[:3], fit[:3]) == 0  # Of three none is dropped.
    assert selection.select_candidate([0.3], [0.0]) == 0
