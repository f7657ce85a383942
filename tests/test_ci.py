"""The workflow runs the commands of `.ci/run`, and the tools check the right files."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
import tiny
import yaml

ROOT = tiny.ROOT


@pytest.fixture(scope="module")
def jobs():
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_the_suite_on_three_pythons_and_lints_once(jobs):
    assert jobs.keys() == {"lint", "suite"}
    assert commands(jobs["lint"]) == [".ci/run lint"]
    assert commands(jobs["suite"]) == [".ci/run suite"]
    versions = jobs["suite"]["strategy"]["matrix"]["python-version"]
    assert versions == ["3.11", "3.12", "3.13"]
    setup = [step for step in jobs["suite"]["steps"] if "setup-python" in step.get("uses", "")]
    assert setup[0]["with"]["python-version"] == "${{ matrix.python-version }}"
    assert setup[0]["with"]["cache"] == "pip"


def test_ci_run_refuses_an_unknown_part():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    result = subprocess.run([script, "everything"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: .ci/run everything: give suite, quick, all or lint")


def test_the_quick_part_is_skipped_without_python_313(tmp_path):
    for name in ("bash", "dirname", "mktemp", "rm"):
        (tmp_path / name).symlink_to(shutil.which(name))
    # As pyenv's stand-in of a version that is not selected.
    (tmp_path / "python3.13").write_text("#!/bin/bash\nexit 127\n")
    (tmp_path / "python3.13").chmod(0o755)
    result = subprocess.run(
        ["bash", ROOT / ".ci/run", "quick"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "Quick part skipped: no python3.13\n")


def test_the_oldest_python_is_the_same_everywhere(jobs):
    """The package's, and the one whose syntax and standard library the tools check for."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    minor = re.search(r"^python_requires = >=3\.(\d+)$", (ROOT / "setup.cfg").read_text(), re.M)[1]
    assert tools["ruff"]["target-version"] == f"py3{minor}"
    assert tools["pyright"]["pythonVersion"] == f"3.{minor}"
    assert jobs["suite"]["strategy"]["matrix"]["python-version"][0] == f"3.{minor}"


def test_hooks_download_nothing():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [each["repo"] for each in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {"ruff-check", "ruff-format", "pyright", "shellcheck"} <= {hook["id"] for hook in hooks}


@pytest.mark.parametrize("name", ["bug.yml", "proposal.yml"])
def test_issue_forms_are_what_github_accepts(name):
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / name).read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_has_the_packages_version():
    from focusdpo_jax import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["type"] == "software"
    (paper,) = citation["references"]
    surnames = [author["family-names"] for author in paper["authors"]]
    readme = (ROOT / "README.md").read_text()
    entry = readme[
        readme.index("@article{jin2025focusdpo") : readme.index("and those it stands on")
    ]
    authors = re.search(r"author  = \{(.*?)\}", entry, re.S)[1]
    assert surnames == re.findall(r"(\w+),", authors)
    assert paper["title"] == " ".join(re.search(r"title   = \{(.*?)\},", entry, re.S)[1].split())
