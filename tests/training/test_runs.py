"""Models read from the folder of a run."""

import contextlib
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from safetensors.numpy import load_file

from focusdpo_jax import config as config_lib
from focusdpo_jax.checkpoints import model_folder, run_export, run_folder
from focusdpo_jax.errors import UserError
from focusdpo_jax.toybox import pretraining
from focusdpo_jax.training import loop, models, preemption, runs


def test_the_random_base_of_a_run_is_initialised_again(tiny_config, tiny_folder, tmp_path):
    config = tiny_config(model__pretrained="")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    shutil.copytree(tiny_folder / "model", tmp_path / "model")  # What the run has made.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = runs.Run(tmp_path)
    base, policy = run.base(), run.policy()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # Nothing of what was trained is in the base: not its weights, and biases are fresh.
    assert not np.any(base.parameters["unet"]["conv_in"]["bias"])
    assert np.all(policy.parameters["unet"]["conv_in"]["bias"])
    caption = "a red star and a blue ball on grass"
    np.testing.assert_array_equal(base.tokenizer(caption), policy.tokenizer(caption))


def test_a_probe_of_another_version_is_not_used(tiny_config, tiny_folder, tmp_path, caplog):
    folder = shutil.copytree(tiny_folder / "model", tmp_path / "model")
    config = tiny_config(model__pretrained=str(folder))
    assert models.load_probe(config) is None and not caplog.text
    probe = pretraining.init_probe(jax.random.key(0))
    model_folder.save_part(epath.Path(folder), "probe", probe)
    np.testing.assert_array_equal(
        models.load_probe(config)["stem_0"]["kernel"], probe["stem_0"]["kernel"]
    )
    del probe["norm_3_0"]
    model_folder.save_part(epath.Path(folder), "probe", probe)
    assert models.load_probe(config) is None and models.open_model(config).probe is None
    assert "probe.safetensors is not used: it is a probe of another version" in caplog.text


# --- Which weights are the newest ------------------------------------------------------------------


def asked_at(step):
    """A `preemption.watch` that has a run leave after this step."""
    return lambda: contextlib.nullcontext(lambda number: signal.SIGTERM if number == step else 0)


@pytest.fixture(scope="module")
def continued(tiny_folder, tmp_path_factory):
    """A run of two steps, as it was finished, and then gone on with to step 3 of 4."""
    folder = tmp_path_factory.mktemp("continued")
    loop.run(tiny.tiny_config(tiny_folder, steps=2, evaluation__pictures=0), folder)
    finished = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(folder, finished)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption, "watch", asked_at(3))
        with pytest.raises(preemption.Preempted):
            loop.run(tiny.tiny_config(tiny_folder, steps=4, evaluation__pictures=0), folder)
    return folder, finished


def weights(model):
    """The trained weights of a `Model` that change most in the tiny run."""
    return model.parameters["unet"]["conv_out"]["kernel"], np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(model.parameters["adapter"])]
    )


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b)))


def test_a_finished_run_gives_its_model_and_its_step(continued):
    _, finished = continued
    assert run_folder.newest_weights(finished) == (finished / "model", 2)
    assert json.loads((finished / "model" / "model.json").read_text())["step"] == 2
    assert same(runs.Run(finished).policy(), runs.Run(finished).checkpoint())


def test_a_continued_run_gives_its_newest_checkpoint(continued):
    folder, finished = continued
    assert run_folder.newest_weights(folder) == (None, 3)
    run = runs.Run(folder)
    assert same(run.policy(), run.checkpoint())
    assert not same(run.policy(), runs.Run(finished).policy())


def test_export_writes_the_newest_checkpoint_and_names_its_step(continued, tmp_path):
    folder, finished = continued
    for run, out in ((folder, "new"), (finished, "old")):
        read = runs.Run(run).checkpoint
        run_export.export_run(run, tmp_path / out, read_checkpoint=read)
    card = (tmp_path / "new" / "README.md").read_text()
    assert (
        "for 3 of 4 steps" in card
        and "for 2 of 2 steps" in (tmp_path / "old/README.md").read_text()
    )
    new, old = (load_file(tmp_path / out / "ip_adapter.safetensors") for out in ("new", "old"))
    assert new.keys() == old.keys() and any(np.any(new[k] != old[k]) for k in new)
    with pytest.raises(
        UserError, match="newest weights are in its checkpoint of step 3, not in model/"
    ):
        run_export.export_run(folder, tmp_path / "none")


def test_export_of_a_checkpoint_is_that_of_the_finished_run(continued, tmp_path):
    _, finished = continued
    shutil.copytree(finished, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "model")  # As a run that was killed before its end.
    for run, out in ((finished, "a"), (tmp_path / "stopped", "b")):
        run_export.export_run(run, tmp_path / out, read_checkpoint=runs.Run(run).checkpoint)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert [str(file) for file in files] == ["README.md", "ip_adapter.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("content", [None, '{"unet": {', "[]"])
def test_an_incomplete_model_folder_gives_the_checkpoint(content, continued, tmp_path):
    shutil.copytree(continued[1], tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.json"
    path.unlink() if content is None else path.write_text(content)
    assert run_folder.newest_weights(tmp_path / "run") == (None, 2)
    assert same(runs.Run(tmp_path / "run").policy(), runs.Run(continued[1]).policy())


def test_a_model_is_none_while_it_is_written(continued, tiny_config, tmp_path, monkeypatch):
    """After a kill between the parts of a second model/, the model.json of the first one is not used."""
    shutil.copytree(continued[0], tmp_path / "run")
    save, saved = model_folder.save_part, []

    def killed(folder, part, tree):
        if part == "unet":
            raise KeyboardInterrupt
        saved.append(part)
        save(folder, part, tree)

    monkeypatch.setattr(model_folder, "save_part", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(tiny_config(steps=4, evaluation__pictures=0), tmp_path / "run")
    assert saved and not (tmp_path / "run" / "model" / "model.json").exists()
    assert run_folder.newest_weights(tmp_path / "run") == (None, 4)


def forget_step(folder):
    """Makes a model/ of what an older version of the package would have left."""
    path = folder / "model" / "model.json"
    values, when = json.loads(path.read_text()), path.stat().st_mtime
    del values["step"]
    path.write_text(json.dumps(values))
    os.utime(path, (when, when))


def test_older_folders_record_no_step(continued, tmp_path):
    for name, folder in zip(("continued", "finished"), continued):
        shutil.copytree(folder, tmp_path / name)
        forget_step(tmp_path / name)
    assert run_folder.newest_weights(tmp_path / "finished") == (tmp_path / "finished" / "model", 2)
    assert run_folder.newest_weights(tmp_path / "continued") == (None, 3)
    # Killed after the last checkpoint and before model/: that of step 2 is older than the checkpoint.
    (tmp_path / "continued" / "config.json").write_text(
        (tmp_path / "continued" / "config.json").read_text().replace('"steps": 4', '"steps": 3')
    )
    os.utime(tmp_path / "continued" / "model" / "model.json", (1, 1))
    assert run_folder.newest_weights(tmp_path / "continued") == (None, 3)
    shutil.rmtree(tmp_path / "finished" / "checkpoints")
    assert run_folder.newest_weights(tmp_path / "finished") == (
        tmp_path / "finished" / "model",
        None,
    )


@pytest.mark.parametrize("removed", ["checkpoints", "checkpoints/3"])
def test_weights_after_going_back_are_those_trained_since(
    removed, continued, tiny_config, tmp_path, monkeypatch
):
    """After checkpoints were removed to go back, the weights trained from there replace the model/ of step 2."""
    shutil.copytree(continued[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / removed)
    if removed == "checkpoints/3":
        path = tmp_path / "run" / "model" / "model.json"  # A model/ of a step that is no more.
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 3}))
    step = 1 if removed == "checkpoints" else 3
    monkeypatch.setattr(preemption, "watch", asked_at(step))
    with pytest.raises(preemption.Preempted):
        loop.run(tiny_config(steps=4, evaluation__pictures=0), tmp_path / "run")
    assert run_folder.newest_weights(tmp_path / "run") == (None, step)


def test_an_unfinished_run_of_an_encoder_has_no_generator(tiny_config, tmp_path):
    config = tiny_config(objective="probe")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    with pytest.raises(
        UserError, match="config.objective = 'probe' is not finished, and its checkpoints"
    ):
        runs.Run(tmp_path).checkpoint()
