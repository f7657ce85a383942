"""Reading the folder of a run."""

import pytest

from focusdpo_jax.checkpoints import run_folder
from focusdpo_jax.errors import UserError


def test_configuration(tmp_path):
    with pytest.raises(UserError, match=r"no run there \(its config.json cannot be read: No such"):
        run_folder.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"beta": 2.0')
    with pytest.raises(UserError, match="config.json is damaged: Expecting ',' delimiter"):
        run_folder.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"beta": 2.0}')
    assert run_folder.read_config(tmp_path) == {"beta": 2.0}


def test_metrics_are_the_last_of_each_name(tmp_path):
    assert run_folder.last_metrics(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "bound": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo'
    )
    assert run_folder.last_metrics(tmp_path) == {"step": 2, "loss": 2.0, "bound": 1.0}
