"""The disrupt command, with hooks of a package that lies on the path."""

import json
import sys

import pytest
from absl.testing import flagsaver
from example_pairs import write

from focusdpo_jax import disrupt
from focusdpo_jax.errors import UserError
from tests.disruption import example_scenes

if not disrupt.flags.FLAGS.is_parsed():
    disrupt.flags.FLAGS(sys.argv[:1])

MODULE = """
def segment(picture, phrase, box):
    mask = picture[..., 0] > 255
    mask[10:30, 10:30] = True
    return mask

number = 3
"""
ENTRIES = """
[focusdpo_jax.segmenters]
most = hooks_of_a_test:segment
number = hooks_of_a_test:number
gone = hooks_of_a_test:gone
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package whose entry points are found as those of installed ones are."""
    folder = tmp_path / "site"
    information = folder / "hooks_of_a_test-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hooks_of_a_test.py").write_text(MODULE)
    (information / "entry_points.txt").write_text(ENTRIES)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hooks_of_a_test\n")
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("hooks_of_a_test", None)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The example without its masks."""
    lines, files = example_scenes.make()
    for line in lines:
        del line["subjects"][1:], line["subjects"][0]["mask"]
    return write(tmp_path_factory.mktemp("scenes"), lines[:2], files)


def run(tiny_folder, scenes, output, **values):
    with flagsaver.flagsaver(**{
            "manifest": str(scenes), "output": str(output), "resolution": 32, "steps": 2,
            "workdir": str(tiny_folder / "model"), "strength": 1.0, "candidates": 2, **values}):
        disrupt.main()


def test_the_command_draws_what_a_segmenter_finds(tiny_folder, installed, scenes, tmp_path, capsys):
    run(tiny_folder, scenes, tmp_path / "pairs", segmenter="most")
    assert "2 of 2 lines, 2 subjects drawn anew" in capsys.readouterr().out
    report = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert (report["status"], report["settings"]["segmenter"]) == ("complete", "most")
    assert (tmp_path / "pairs" / "contact_sheet.png").exists()


@pytest.mark.parametrize(("values", "reason"), [
    ({"segmenter": "sam"}, "--segmenter=sam: no installed package has such an entry point in the "
                           r"group focusdpo_jax.segmenters \(there: gone, most, number\)"),
    ({"captioner": "blip"}, r"group focusdpo_jax.captioners \(there: none\)"),
    ({"segmenter": "gone"}, r"hooks_of_a_test:gone cannot be loaded \(AttributeError"),
    ({"segmenter": "number"}, "hooks_of_a_test:number is int and not a function"),
    ({"manifest": "gone.jsonl"}, "--manifest=gone.jsonl cannot be read"),
    ({"strength": 0.0}, "strength is 0.0 of 2 steps; choose a share of 1 step or more: 0.5 to 1"),
    ({"resolution": None}, "does not say how large its pictures are; give --resolution"),
    ({"resolution": 33}, "--resolution=33: give a positive multiple of 4"),
    ({"workdir": "nowhere"}, "nowhere"),
    ({"dinov2": "nowhere"}, "nowhere"),
])
def test_mistakes_are_named(tiny_folder, installed, scenes, tmp_path, values, reason):
    with pytest.raises(UserError, match=reason):
        run(tiny_folder, scenes, tmp_path / "pairs", **values)
    assert not (tmp_path / "pairs").exists()
