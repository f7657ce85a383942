"""The machine of the tests of launch/."""

import subprocess

import pytest

from tests.launch import stand_ins


@pytest.fixture
def fake(tmp_path):
    """The folder of the stand-ins: `bin`, `calls`, and what they keep."""
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)
    yield tmp_path
    for pid in tmp_path.glob("host*/focusdpo_jax.pid"):  # What a failed test has left running.
        subprocess.run(
            ["bash", "-c", f"kill -KILL -- -{pid.read_text().strip()}"], stderr=subprocess.DEVNULL
        )
