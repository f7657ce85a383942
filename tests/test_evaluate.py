"""The evaluate command: one-line messages for user errors."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from focusdpo_jax import config

CONFIG = str(pathlib.Path(__file__).parent.parent / "configs" / "toybox_dpo.py")
# All in one process, since every start costs seconds. `sample`'s flags have the same names, so it
# is one of its own.
CALLS = """
import json, sys
from absl import flags
from focusdpo_jax import evaluate
calls = json.loads(sys.argv[1])
for arguments in calls:
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    try:
        sys.argv = ["evaluate", *arguments]  # Where config_flags looks for --config.FIELD.
        evaluate.parse_flags(sys.argv)
        evaluate.main()
    except evaluate.UserError as error:
        print(str(error).replace(chr(10), " "))
    except SystemExit:
        print("SystemExit")
"""
MISTAKES = [
    ([], "give --output"),
    (["--output=OUT"], "give --workdir"),
    (["--output=OUT", "--workdir=nowhere"], "--workdir=nowhere: no run there"),
    (["--output=OUT", "--workdir=base"], "--workdir=base: give --config too"),
    (["--output=OUT", f"--config={CONFIG}"], "--workdir=runs/toybox_dpo: no run there"),
    (
        ["--output=OUT", f"--config={CONFIG}", "--workdir=base", "--config.evaluation.scenes=0"],
        "config.evaluation.scenes = 0",
    ),
    (["--output=OUT", f"--config={CONFIG}", "--workdir=base", "--share=4/4"], "--share=4/4"),
    (
        [
            "--output=OUT",
            f"--config={CONFIG}",
            "--workdir=base",
            "--sampler=plms",
            "--limit=1",
            "--batch_size=1",
        ],
        "one of ddim",
    ),
    (
        [
            "--output=OUT33",
            f"--config={CONFIG}",
            "--workdir=base",
            "--config.resolution=33",
            "--limit=1",
        ],
        "config.resolution = 33: a latent of this model covers 4 pixels in each direction; give a positive "
        "multiple of 4, such as 32",
    ),
    # What was refused above has claimed nothing in the folder.
    (
        [
            "--output=OUT",
            f"--config={CONFIG}",
            "--workdir=base",
            "--steps=5000",
            "--limit=1",
            "--batch_size=1",
        ],
        "sampling steps is 5000",
    ),
    (["--output=OUT", "--workdir=unfinished"], "--workdir=unfinished: the run has no checkpoint"),
    (["--output=OUT", "--images=OUT", "--dreambench=nowhere"], "give --dinov2, --dino or --clip"),
    (
        ["--output=OUT", "--images=OUT", "--dreambench=nowhere", "--dinov2=x"],
        "--dreambench=nowhere is not a folder",
    ),
    (["--compare", "OUT", "OUT"], "results.json cannot be read"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.json").write_text(
        config.to_json(tiny.run_config("toybox_dpo"))
    )
    calls = [
        [argument.replace("OUT", str(folder / "out")) for argument in arguments]
        for arguments, _ in MISTAKES
    ]
    result = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
    )
    assert not (folder / "out33").exists()
    return result.stdout.splitlines()


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_named(said, number):
    assert len(said) == len(MISTAKES)
    assert MISTAKES[number][1] in said[number]
