"""The notebooks of examples/ run from the first cell to the last, outside the repository, and their losses decrease."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(name, folder, **environment):
    """Runs the code cells of a notebook in one namespace, in a separate process; returns its output."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    script = folder / f"{name}.py"
    script.write_text("\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))
    path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_notebooks_without_outputs(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        keys = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            keys |= {"outputs", "execution_count"}
        assert set(cell) == keys


@pytest.mark.slow
def test_focus_in_your_trainer(tmp_path):
    """The policy starts as the reference model, and ends by preferring the chosen images."""
    printed = run("focus_in_your_trainer", tmp_path)
    rows = [
        (int(step), float(accuracy), float(loss))
        for step, accuracy, loss in re.findall(
            r"^(\d+) implicit_accuracy (\S+) loss (\S+)$", printed, re.MULTILINE
        )
    ]
    assert [step for step, _, _ in rows] == [0, 40, 80, 120, 160, 200]
    assert rows[0][2] == 0.693
    assert rows[-1][1] > 0.65 and rows[-1][2] < 0.62


@pytest.mark.slow
def test_toybox_from_data_to_table(tmp_path):
    """Two steps on 16 pairs: a table of all measures, the losses of the steps, and one of each measure again."""
    printed = run(
        "toybox_from_data_to_table", tmp_path, FOCUSDPO_SHORT="1", FOCUSDPO_WORKDIR=str(tmp_path)
    )
    assert "Toybox, 8 test scenes with subjects never trained on" in printed
    for name in ("fidelity", "leakage", "class accuracy", "part"):
        assert re.search(rf"^{name} +[↑↓] .*%", printed, re.MULTILINE)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    fidelity = results["metrics"]["fidelity"]
    line = f"fidelity             base {fidelity['base']['mean']:.3f}   policy {fidelity['policy']['mean']:.3f}"
    assert line in printed.splitlines()
    steps = [line.split()[0] for line in printed.splitlines() if re.match(r"\d+ \d\.\d+ ", line)]
    assert steps[-1] == "2"
