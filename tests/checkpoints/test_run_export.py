"""The export command and its errors; tests/parity loads the files with diffusers."""

import json
import subprocess
import sys

import pytest

from focusdpo_jax.checkpoints import model_card, run_export
from focusdpo_jax.errors import UserError

RUN = {
    "objective": "focus_dpo",
    "trainable": "adapter",
    "resolution": 32,
    "steps": 4,
    "model": {"pretrained": "toybox"},
    "data": {"path": "data", "seed": 7, "train_size": 12},
}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"run: no run there \(its config.json cannot be"):
        run_export.export_run(tmp_path / "run", tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    with pytest.raises(UserError, match=r"the run is not finished \(it has no model/ yet\)"):
        run_export.export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_card_warns_of_files_that_diffusers_cannot_read():
    card = model_card.render(
        RUN,
        {"step": 2, "loss": 0.125, "t0-9/loss": 1.0},
        ("adapter",),
        False,
        "the subject adapter has depth = 2 (not 4)",
    )
    assert "**`ip_adapter.safetensors` is not for diffusers:** the subject adapter has" in card
    assert "| loss | 0.125 |" in card and "t0-9" not in card
    assert "2 of 4 steps" in card and "ENCODER the folder of its image encoder" in card
    assert "from_pretrained(BASE, image_encoder=encoder)" in card and "All weights" not in card


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=nowhere", "--output=out"], "error: --workdir=nowhere: no run there"),
        (["--output=out"], "error: flag --workdir=None: Flag --workdir must have a value"),
    ],
)
def test_command_line_mistakes_are_one_line(arguments, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "focusdpo_jax.export", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and errors[0].startswith(message), result.stderr
    assert "Traceback" not in result.stderr
