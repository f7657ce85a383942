"""The teacher-forced measure by hand, its regions and its noise; and the stages of the evidence."""

import json

import jax
import numpy as np
import pytest
import tiny

from experiments import evidence, teacher_forced
from focusdpo_jax.errors import UserError
from focusdpo_jax.training import models

pytestmark = pytest.mark.filterwarnings("ignore")


def test_changes_by_hand():
    # Two pairs, one timestep, a grid of one row and three locations: one location per region.
    regions = np.eye(3).reshape(1, 3, 1, 3).repeat(2, axis=0)
    regions[1, 0] = 0  # The second pair has no changed location.
    base = np.full((2, 1, 2, 1, 3), 0.5)
    policy = base.copy()
    policy[0, 0, 0] = [0.45, 0.5, 0.55]  # Chosen.
    policy[0, 0, 1] = [0.6, 0.5, 0.55]  # Rejected.
    found = teacher_forced.changes(policy, base, regions)
    # In percent of 0.5: the gain is 0.1 - (-0.05) = 0.15.
    np.testing.assert_allclose(found["gain"][0, 0], [30, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found["winner"][0, 0], [-10, 0, 10], atol=1e-9)
    assert np.isnan(found["gain"][1, 0, 0]) and not np.isnan(found["gain"][1, 0, 1:]).any()


def test_a_table_has_means_and_paired_differences():
    gain = np.zeros((40, 1, 1, 3))
    gain[:, 0, 0, 0] = np.linspace(-5, 5, 40)
    results = {
        "first": {"gain": gain, "winner": np.zeros_like(gain)},
        "second": {"gain": gain + 1, "winner": np.zeros_like(gain)},
    }
    rows = evidence.table(results, ["first", "second"], "first")
    assert rows[1][0] == "first" and "[-" in rows[1][1]
    # The difference is 1 for every pair, however much pairs vary.
    assert rows[-1][:2] == ["second", "+1.00 [+1.00, +1.00]"]
    assert {len(row) for row in rows} == {1 + len(evidence.SHOWN)}


@pytest.mark.parametrize("pairs", ["0", "33"])
def test_a_number_of_pairs_that_no_batch_divides_is_refused(pairs, capsys):
    with pytest.raises(SystemExit):
        evidence.parse(["--pairs", pairs])
    assert f"--pairs={pairs}: give a multiple of 32" in capsys.readouterr().err


def write_gate(arguments, rows):
    """Writes the gate's file as `evidence` does, for one bucket."""
    parsed = evidence.parse(arguments)
    content = {"settings": evidence.gate_settings(parsed), "buckets": {"t000-999": rows}}
    (parsed.output / "gate.json").write_text(json.dumps(content))


def test_the_script_stops_where_no_map_passes_the_gate(tmp_path):
    row = {"prior_dpo": 0.95, "dpo": 0.9, "halves": 0.5, "norm": 2.0}
    rows = {name: row for name in ("dpo", "prior_dpo", "oracle", "focus_dpo")}
    arguments = ["--output", str(tmp_path), "--stages", "gate"]
    arguments += ["--methods", "dpo", "prior_dpo", "focus_dpo"]
    write_gate(arguments, rows)
    with pytest.raises(UserError, match="no weight map passes the gate"):
        evidence.main(arguments)
    rows["focus_dpo"] = row | {"prior_dpo": 0.89}
    write_gate(arguments, rows)
    evidence.main(arguments)
    # Gradients of other settings are not taken for these.
    for change in (["--set", "anchor=2.0"], ["--gradient_pairs", "32"]):
        with pytest.raises(
            UserError, match=r"has gradients of .* \(now .*\); give another --output"
        ):
            evidence.main([*arguments, *change])
    evidence.main([*arguments, "--steps", "7"])  # No gradient depends on the number of steps.


@pytest.mark.slow
def test_regions_and_noise(tiny_config):
    """Regions share the image; equal parameters have equal errors, others do not."""
    config = tiny_config(
        data__one_look_probability=1.0,
        data__prior_mask="dilated",
        data__nuisance_probability=1.0,
    )
    model = models.load_model(config)
    held_out = teacher_forced.open_pairs(config, model, split="validation", count=4, batch_size=2)
    assert len(held_out.batches) == 2
    regions = held_out.regions
    np.testing.assert_allclose(regions.sum(1), 1, atol=1e-6)
    assert regions.min() >= 0
    # A changed attribute covers a part of the prior mask alone.
    prior = np.concatenate([np.asarray(pairs.prior) for pairs in held_out.batches])
    assert (regions[:, 0] <= prior + 1e-6).all()
    assert 0 < regions[:, 0].sum() < 0.9 * prior.sum()
    base = teacher_forced.error_maps(config, model, model.parameters, held_out)
    assert base.shape == (4, len(teacher_forced.TIMESTEPS), 2, *regions.shape[2:])
    again = teacher_forced.error_maps(config, model, model.parameters, held_out)
    np.testing.assert_array_equal(base, again)
    # Outside the prior mask both images and their noise are equal.
    outside = np.broadcast_to((prior == 0)[:, None], base[:, :, 0].shape)
    far = np.abs(base[:, :, 0] - base[:, :, 1])[outside].mean()
    assert far < np.abs(base[:, :, 0] - base[:, :, 1])[~outside].mean() / 2
    scaled = dict(model.parameters)
    scaled["unet"] = jax.tree.map(lambda x: 1.05 * x, model.parameters["unet"])
    moved = teacher_forced.error_maps(config, model, scaled, held_out)
    found = teacher_forced.changes(moved, base, regions)
    assert np.nanmax(np.abs(found["winner"])) > 0.01
    assert not np.nanmax(np.abs(teacher_forced.changes(base, base, regions)["gain"]))


@pytest.mark.slow
def test_a_method_is_trained_once_and_measured(tiny_folder, tmp_path, capsys):
    """Two methods of two steps; the same command then reads the results."""
    fields = tiny.OVERRIDES | {
        "model.pretrained": str(tiny_folder / "model"),
        "data.path": str(tmp_path / "data"),
        "focus.buckets": 1,
        "trainable": "full",
        "evaluation.pictures": 0,
        "match_beta": True,
    }
    arguments = ["--output", str(tmp_path), "--stages", "methods", "--steps", "2", "--seeds", "1"]
    arguments += ["--pairs", "32", "--methods", "prior_dpo", "focus_dpo"]
    # A step of focus_dpo takes 16 pairs.
    fields |= {"steps": 2, "data.prior_mask": "dilated", "data.train_size": 16}
    for name, value in fields.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    with pytest.raises(UserError, match="has no gradient of prior_dpo, whose norm sets its beta"):
        evidence.main(arguments)
    norms = {"dpo": {"norm": 1.0}, "prior_dpo": {"norm": 2.0}, "focus_dpo": {"norm": 0.5}}
    write_gate(arguments, norms)
    evidence.main(arguments)
    table = capsys.readouterr().out
    for name, beta, anchor in (("prior_dpo", 50.0, 2.0), ("focus_dpo", 200.0, 0.5)):
        saved = json.loads((tmp_path / "trials" / f"{name}_0" / "run" / "config.json").read_text())
        assert (saved["beta"], saved["anchor"]) == (beta, anchor)
    (result,) = (tmp_path / "trials" / "prior_dpo_0").glob("validation_32.npz")
    with np.load(result) as saved:
        assert saved["gain"].shape == (32, 4, 3)
        assert np.nanmax(np.abs(saved["gain"])) > 1e-4
    written = result.stat().st_mtime_ns
    evidence.main(arguments)
    assert result.stat().st_mtime_ns == written
    assert capsys.readouterr().out == table
    assert "focus_dpo" in (tmp_path / "evidence.md").read_text()
    with pytest.raises(UserError, match=r"has results of config.anchor = 2.0 \(now 6.0\); give"):
        evidence.main([*arguments, "--set", "anchor=3.0"])
    with pytest.raises(UserError, match=r"has results of config.steps = 2 \(now 4\); give"):
        evidence.main([*arguments, "--set", "steps=4"])
