"""The study's harness: its trials, resuming after an interruption, and the measures of a trial."""

import dataclasses
import json
import subprocess
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from experiments import study_report, study_trial, toybox_study
from focusdpo_jax.errors import UserError
from focusdpo_jax.toybox import pretraining
from focusdpo_jax.training import models


@pytest.fixture(scope="module")
def study():
    """The three files of the study as modules: (toybox_study, study_trial, study_report)."""
    return toybox_study, study_trial, study_report


LINE = (
    "--steps=4 --points=2 --seeds=2 --scenes=6 --validation=5 --learning_rates 0.1 0.2 "
    "--betas 10 --anchors 0.5 --objectives sft focus_dpo --ablations"
).split() + ["one bucket"]


def settings(study, tmp_path, *more):
    return study[0].parse([f"--output={tmp_path}", *LINE, *more])


def values(study, scene_means):
    """A measurement whose measures all have these means, [scenes] of two subjects."""
    per_subject = np.repeat(np.asarray(scene_means, float)[:, None], 2, axis=1)
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    return {name: per_subject for name in study[2].SHOWN} | {
        "leakage": 1 - per_subject,
        "pictures": picture,
        "chosen": picture,
        "references": picture[:, None],
        "present": np.ones((1, 1), bool),
    }


@pytest.fixture
def no_training(study, monkeypatch):
    """Trials end at once; the list of the folders that were run, in their order."""
    ran = []

    def run(line, **_):
        folder = line[-1]
        trial = json.loads((folder / "trial.json").read_text())
        ran.append(folder.name)
        overrides = trial["overrides"]
        mean = overrides.get("learning_rate", 0.0) + (overrides.get("objective") == "focus_dpo") / 2
        for step in trial["steps"]:
            study[1].save(
                folder / f"{trial['split']}_{step:06d}.npz",
                values(study, np.full(trial["scenes"], mean)),
            )
        return subprocess.CompletedProcess(line, 0)

    # Not in the module `subprocess` itself, through which matplotlib looks for fonts.
    stand_in = types.SimpleNamespace(run=run, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(study[0], "subprocess", stand_in)
    return ran


def test_a_study_tunes_on_validation_and_reports_other_seeds_on_test(
    study, tmp_path, no_training, capsys
):
    study[0].main([f"--output={tmp_path}", *LINE])
    assert sorted(no_training[:4]) == [
        "tune_focus_dpo_l0.1_b10_a0.5",
        "tune_focus_dpo_l0.2_b10_a0.5",
        "tune_sft_l0.1",
        "tune_sft_l0.2",
    ]
    assert sorted(no_training[4:]) == sorted(
        ["test_base_s1"]
        + [f"test_sft_l0.2_s{seed}" for seed in (1, 2)]
        + [
            f"{name}_l0.2_b10_a0.5_s{seed}"
            for name in ("test_focus_dpo", "ablation_one_bucket")
            for seed in (1, 2)
        ]
    )
    report = json.loads((tmp_path / "study.json").read_text())
    # The better rate won: fidelity 0.2 (and 0.7), leakage 1 less that.
    assert report["chosen"]["sft"] == {"objective": "sft", "learning_rate": 0.2}
    assert report["chosen"]["focus_dpo"] == {
        "objective": "focus_dpo",
        "learning_rate": 0.2,
        "beta": 10,
        "anchor": 0.5,
    }
    assert report["results"]["focus_dpo"]["fidelity"]["mean"] == pytest.approx(0.7)
    assert report["results"]["focus_dpo"]["leakage"]["mean"] == pytest.approx(0.3)
    assert sorted(report["curves"]["sft"]) == ["2", "4"]
    printed = capsys.readouterr().out
    assert "| sft | 20.0 [20.0, 20.0] (20/20) - | 80.0 [80.0, 80.0] (80/80) -" in printed
    for name in ("curves.png", "pictures.png"):
        assert Image.open(tmp_path / name).size[0] > 50
    ablation = json.loads(
        (tmp_path / "trials" / "ablation_one_bucket_l0.2_b10_a0.5_s1" / "trial.json").read_text()
    )
    assert ablation["overrides"]["focus.buckets"] == 1 and ablation["overrides"]["beta"] == 10
    assert ablation["steps"] == [4] and ablation["overrides"]["decay"] == "constant"


def test_settings_are_chosen_by_the_mean_of_the_tuning_seeds(study, tmp_path):
    run = settings(study, tmp_path, "--tuning_seeds=2", "--learning_rates", "0.1", "0.2", "0.3")
    tuning = list(study[0].tuning_trials(run))
    assert [trial.name for trial in tuning[:4]] == [
        "tune_sft_l0.1",
        "tune_sft_l0.1_s1",
        "tune_sft_l0.2",
        "tune_sft_l0.2_s1",
    ]
    # The best single trial is at 0.3, the best mean at 0.2.
    means = {0.1: (0.2, 0.2), 0.2: (0.5, 0.5), 0.3: (0.7, 0.1)}
    for trial in tuning:
        fields = trial.overrides
        folder = tmp_path / "trials" / trial.name
        folder.mkdir(parents=True)
        study[1].save(
            folder / f"validation_{run.steps:06d}.npz",
            values(study, np.full(2, means[fields["learning_rate"]][fields["seed"]])),
        )
    chosen, _ = study[0].choose(run, tuning)
    assert chosen["sft"]["learning_rate"] == chosen["focus_dpo"]["learning_rate"] == 0.2
    assert study[0].at_the_edge(run, chosen) == []
    edge = {"sft": {"learning_rate": 0.3}}
    assert study[0].at_the_edge(run, edge) == ["sft: learning_rate 0.3"]
    reported = study[0].reported_trials(run, chosen)
    assert [trial.overrides["seed"] for trial in reported["sft"]] == [2, 3]


def test_differences_are_paired(study, tmp_path):
    """A difference of every scene is exact, however much the scenes vary."""
    reported = {}
    for name, means in (("focus_dpo", [0.1, 0.5, 0.9]), ("dpo", [0.05, 0.45, 0.85])):
        (trial,) = reported[name] = [study[0].Trial(name, {}, "test", 3, (0,))]
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True)
        study[1].save(folder / "test_000000.npz", values(study, means))
    found = study[2].differences(reported, tmp_path)
    assert list(found) == ["dpo"]
    assert found["dpo"]["fidelity"][:3] == pytest.approx((-0.05, -0.05, -0.05))
    row = study[2].difference_table(found).splitlines()[-1]
    assert row.startswith("| dpo | -5.0 [-5.0, -5.0] - | +5.0 [+5.0, +5.0] - |")


def test_differences_of_each_seed(study, tmp_path):
    """Training seeds are compared one by one; the base has no training, so no seeds."""
    reported = {}
    for name, means in (("base", [0.0]), ("focus_dpo", [0.5, 0.6]), ("dpo", [0.4, 0.8])):
        reported[name] = [
            study[0].Trial(f"{name}{seed}", {"seed": seed}, "test", 2, (0,))
            for seed in range(len(means))
        ]
        for trial, mean in zip(reported[name], means):
            (tmp_path / "trials" / trial.name).mkdir(parents=True)
            path = tmp_path / "trials" / trial.name / "test_000000.npz"
            study[1].save(path, values(study, [mean, mean]))
    by_seed = study[2].differences_by_seed(reported, tmp_path)
    assert list(by_seed) == ["dpo"]
    assert by_seed["dpo"]["leakage"] == pytest.approx([0.1, -0.2])
    *_, base, dpo = (
        study[2].difference_table(study[2].differences(reported, tmp_path), by_seed).splitlines()
    )
    assert base.startswith("| base | -55.0 [-55.0, -55.0] - |")
    assert dpo.startswith("| dpo | +5.0 [+5.0, +5.0] (-10.0/+20.0) +")


def test_finished_trials_are_skipped_and_shares_are_disjoint(study, tmp_path, no_training):
    tuning = list(study[0].tuning_trials(settings(study, tmp_path)))
    first, second = (settings(study, tmp_path, f"--share={i}/2") for i in (0, 1))
    assert not study[0].run_trials(first, tuning)
    assert no_training == [tuning[0].name, tuning[2].name]
    assert study[0].run_trials(second, tuning)
    assert no_training[2:] == [tuning[1].name, tuning[3].name]
    (tmp_path / "trials" / tuning[1].name / "validation_000004.npz").unlink()
    assert study[0].run_trials(settings(study, tmp_path), tuning)
    assert no_training[4:] == [tuning[1].name]


def test_measurements_with_other_settings_are_refused(study, tmp_path, no_training):
    tuning = list(study[0].tuning_trials(settings(study, tmp_path)))
    assert study[0].run_trials(settings(study, tmp_path), tuning)
    longer = [dataclasses.replace(trial, steps=(4, 8)) for trial in tuning]
    assert study[0].run_trials(settings(study, tmp_path), longer)
    assert len(no_training) == 2 * len(tuning)
    other = list(study[0].tuning_trials(settings(study, tmp_path, "--set", "batch_size=4")))
    with pytest.raises(UserError, match="other settings .*trial.json.*; give another --output"):
        study[0].run_trials(settings(study, tmp_path), other)


def test_seeds_are_pooled_scene_by_scene(study, tmp_path):
    trials = [study[0].Trial(f"t{seed}", {}, "test", 2, (0,)) for seed in (1, 2)]
    for trial, mean in zip(trials, (0.0, 1.0)):
        folder = tmp_path / "trials" / trial.name
        folder.mkdir(parents=True)
        study[1].save(folder / "test_000000.npz", values(study, [mean, mean]))
    estimate = study[2].estimates(trials, tmp_path)["fidelity"]
    # Both scenes are half right, whichever are drawn; the seeds do not count as scenes.
    assert (estimate["mean"], estimate["low"], estimate["high"]) == (0.5, 0.5, 0.5)
    assert estimate["n"] == 2 and estimate["seeds"] == [0.0, 1.0]


@pytest.mark.slow
def test_a_trial_trains_in_stretches_and_measures_unseen_scenes(study, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    config = tiny.tiny_config(tiny_folder)
    model = models.load_model(config)
    models.save_model(folder, model, model.parameters, pretraining.init_probe(jax.random.key(0)))
    path = tmp_path / "config.py"
    path.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\nimport tiny\n"
        f"def get_config():\n    return tiny.tiny_file_config(pathlib.Path({str(tiny_folder)!r}))\n"
    )
    trial = study[0].Trial("t", {"model.pretrained": str(folder)}, "test", 4, (1, 2))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "trial.json").write_text(
        json.dumps(dataclasses.asdict(trial) | {"config": str(path)})
    )
    study[1].run(tmp_path / "t")
    measured = {step: dict(np.load(tmp_path / "t" / f"test_{step:06d}.npz")) for step in (1, 2)}
    assert sorted(tiny.losses(tmp_path / "t" / "run")) == [1, 2]
    assert measured[1]["fidelity"].shape == (4, 3) and measured[1]["missing"].shape == (4, 3)
    present = measured[1]["present"]
    assert set(present.sum(1)) <= {2, 3} and present.shape == (4, 3)
    assert np.any(measured[1]["pictures"] != measured[2]["pictures"])
    np.testing.assert_array_equal(measured[1]["references"], measured[2]["references"])
