"""The disrupt command, with hooks of an installed package."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
from example_pairs import write

from tests.disruption import example_scenes

# All in one process, since every start costs seconds. `sample`'s flags have the same names, so it
# is one of its own.
CALLS = """
import json, sys
from absl import flags
from focusdpo_jax import disrupt
from focusdpo_jax.errors import UserError
for arguments in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["disrupt", *arguments])
    try:
        disrupt.main()
    except UserError as error:
        print("REASON", str(error).replace(chr(10), " "))
"""
MODULE = """
def segment(image, phrase, box):
    mask = image[..., 0] > 255
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


MISTAKES = [
    (
        {"segmenter": "sam"},
        "--segmenter=sam: no installed package has such an entry point in the "
        r"group focusdpo_jax.segmenters \(there: gone, most, number\)",
    ),
    ({"captioner": "blip"}, r"group focusdpo_jax.captioners \(there: none\)"),
    ({"segmenter": "gone"}, r"hooks_of_a_test:gone cannot be loaded \(AttributeError"),
    ({"segmenter": "number"}, "hooks_of_a_test:number is int and not a function"),
    ({"manifest": "gone.jsonl"}, "--manifest=gone.jsonl cannot be read"),
    ({"strength": 0.0}, "strength is 0.0 of 2 steps; choose a share of 1 step or more: 0.5 to 1"),
    ({"resolution": None}, "does not state the size of its images; give --resolution"),
    (
        {"resolution": 33},
        "--resolution=33: a latent of this model covers 4 pixels in each direction; give a "
        "positive multiple of 4, such as 32",
    ),
    ({"workdir": "nowhere"}, "nowhere"),
    ({"dinov2": "nowhere"}, "nowhere"),
]


@pytest.fixture
def installed(tmp_path):
    """The folder of a package whose entry points are found as those of installed ones are."""
    folder = tmp_path / "site"
    information = folder / "hooks_of_a_test-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hooks_of_a_test.py").write_text(MODULE)
    (information / "entry_points.txt").write_text(ENTRIES)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hooks_of_a_test\n")
    return folder


def test_a_segmenter_fills_in_masks_and_mistakes_are_named(tiny_folder, installed, tmp_path):
    lines, files = example_scenes.make()
    for line in lines:
        del line["subjects"][1:], line["subjects"][0]["mask"]
    scenes = write(tmp_path / "scenes", lines[:2], files)

    def call(output, **values):
        values = {
            "manifest": scenes,
            "output": tmp_path / output,
            "resolution": 32,
            "steps": 2,
            "workdir": tiny_folder / "model",
            "strength": 1.0,
            "candidates": 2,
        } | values
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    calls = [call("pairs", segmenter="most"), *(call("none", **values) for values, _ in MISTAKES)]
    result = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(installed), str(tiny.ROOT), os.environ.get("PYTHONPATH", "")]
            )
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 of 2 lines, 2 subjects inpainted" in result.stdout
    report = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert (report["status"], report["settings"]["segmenter"]) == ("complete", "most")
    assert (tmp_path / "pairs" / "contact_sheet.png").exists()

    found = [line for line in result.stdout.splitlines() if line.startswith("REASON")]
    assert len(found) == len(MISTAKES)
    for line, (_, reason) in zip(found, MISTAKES):
        assert re.search(reason, line), (line, reason)
    assert not (tmp_path / "none").exists()
