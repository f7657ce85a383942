"""The real loop on a tiny run: the files it writes, and that it can be interrupted and resumed."""

import collections
import functools
import gc
import json
import logging as python_logging
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from absl import logging as absl_logging
from flax import traverse_util
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from focusdpo_jax import config as config_lib
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import builders, loop, models, runs, state, writers
from focusdpo_jax.training.clu_without_tensorflow import metric_writers
from focusdpo_jax.training.step import Step

pytestmark = pytest.mark.filterwarnings("ignore")
# For runs whose images no assertion reads: drawing takes half of a short run.
NOT_DRAWN = {"evaluation__pictures": 0}


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """An uninterrupted run of four steps, and its log."""
    workdir = tmp_path_factory.mktemp("finished")
    records = []
    handler = python_logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger, verbosity = python_logging.getLogger("absl"), absl_logging.get_verbosity()
    logger.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        loop.run(tiny.tiny_config(tiny_folder), workdir)
    finally:
        logger.removeHandler(handler)
        absl_logging.set_verbosity(verbosity)
    return workdir, records


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """trained(trainable): the folder of a finished run of two steps; that of "lora" has images."""

    @functools.cache
    def make(trainable):
        workdir = tmp_path_factory.mktemp(trainable)
        rank = 2 if trainable == "lora" else 0
        drawn = {} if trainable == "lora" else NOT_DRAWN
        loop.run(
            tiny.tiny_config(
                tiny_folder, trainable=trainable, model__lora_rank=rank, steps=2, **drawn
            ),
            workdir,
        )
        return workdir

    return make


def command(folder, workdir, *overrides):
    """The command line of the tiny run, from a configuration file in `folder`."""
    path = folder / "tiny_dpo.py"
    if not path.exists():
        tests = str(pathlib.Path(tiny.__file__).parent)
        path.write_text(
            f"import pathlib, sys\nsys.path.insert(0, {tests!r})\n"
            "import tiny\n"
            f"def get_config():\n    return tiny.tiny_file_config(pathlib.Path({str(folder)!r}))\n"
        )
    return [
        sys.executable,
        "-m",
        "focusdpo_jax.main",
        f"--config={path}",
        f"--workdir={workdir}",
        *overrides,
    ]


def final_parameters(workdir):
    from safetensors.numpy import load_file

    return load_file(workdir / "model" / "unet.safetensors")


def test_run_writes_the_documented_files(finished):
    workdir, _ = finished
    assert sorted(tiny.losses(workdir)) == [1, 2, 3, 4]
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    for name in (
        "loss",
        "implicit_accuracy",
        "margin",
        "winner_error_difference",
        "loser_error_difference",
        "reference_error",
        "gradient_norm",
        "pairs_per_second",
    ):
        assert np.isfinite(line[name]), name
    assert json.loads((workdir / "config.json").read_text())["beta"] == 100.0
    assert (workdir / "checkpoints" / "4").is_dir()
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == [
        "focus_000004.png",
        "step_000004.png",
    ]
    assert list(workdir.glob("events.out.tfevents.*"))
    assert "trainable/" in (workdir / "parameters.txt").read_text()
    assert (workdir / "model" / "model.json").exists()


def test_first_loss_is_that_of_equal_models(finished):
    # Policy and reference are one model, so the margin is zero but for rounding.
    assert abs(tiny.losses(finished[0])[1] - np.log(2)) < 1e-4


def test_buckets_of_one_structure_share_an_executable(finished):
    log = finished[1]
    assert any(line.startswith("compiled 2 executables for 4 buckets in ") for line in log)
    assert [line for line in log if line.startswith("  focus_dpo")] == [
        "  focus_dpo (spaf): t750-999, t500-749",
        "  focus_dpo (spaf+dpce): t250-499, t000-249",
    ]


def test_resumed_run_equals_uninterrupted_one(finished, trained, tiny_config, tmp_path):
    shutil.copytree(trained("adapter"), tmp_path, dirs_exist_ok=True)
    assert sorted(tiny.losses(tmp_path)) == [1, 2]
    loop.run(tiny_config(**NOT_DRAWN), tmp_path)
    assert tiny.losses(tmp_path) == tiny.losses(finished[0])
    expected = final_parameters(finished[0])
    for name, value in final_parameters(tmp_path).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_resumed_run_with_muon_equals_an_uninterrupted_one(tiny_config, tmp_path):
    fields = {"optimizer": "muon", "objective": "dpo", **NOT_DRAWN}
    config = tiny_config(**fields)
    loop.run(config, tmp_path / "whole")
    loop.run(tiny_config(**fields, steps=2), tmp_path / "parts")
    loop.run(config, tmp_path / "parts")
    assert tiny.losses(tmp_path / "parts") == tiny.losses(tmp_path / "whole")
    expected = final_parameters(tmp_path / "whole")
    for name, value in final_parameters(tmp_path / "parts").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_another_seed_gives_other_losses(finished, tiny_config, tmp_path):
    # The same seed gives the same: see the run that is resumed and the one without TensorFlow.
    loop.run(tiny_config(seed=1, **NOT_DRAWN), tmp_path)
    expected, other = tiny.losses(finished[0]), tiny.losses(tmp_path)
    assert all(other[step] != expected[step] for step in (2, 3, 4))


@pytest.mark.parametrize("objective", ["dpo", "patch_dpo", "subject_sft"])
def test_other_objectives_run_by_one_field(objective, tiny_config, tmp_path):
    loop.run(tiny_config(objective=objective, steps=3), tmp_path)
    values = tiny.losses(tmp_path)
    if objective not in ("patch_dpo", "subject_sft"):
        assert abs(values[1] - np.log(2)) < 1e-4
    # The learning rate of the first step is zero.
    assert abs(values[3] - values[2]) > 1e-3


def test_a_run_whose_maps_are_the_policys_departs_from_the_second_step(tiny_config, tmp_path):
    """At the first steps policy and reference model are equal, and with them the weights."""
    losses = []
    for observed in ("reference", "policy"):
        config = tiny_config(
            steps=3,
            focus__buckets=1,
            focus__lambda_c=4.0,
            focus__observed=observed,
            learning_rate=1e-2,
            **NOT_DRAWN,
        )
        loop.run(config, tmp_path / observed)
        losses.append(tiny.losses(tmp_path / observed))
    reference, policy = losses
    assert policy[1] == pytest.approx(reference[1], rel=1e-6)
    assert abs(policy[3] - reference[3]) > 1e-6 * abs(reference[3])


@pytest.mark.parametrize(
    "trainable, changed, kept",
    [("adapter", "to_k_ip", "to_q/kernel"), ("lora", "lora_b", "to_q/kernel")],
)
def test_only_the_trainable_set_changes(trainable, changed, kept, trained, tiny_folder):
    before, after = final_parameters(tiny_folder), final_parameters(trained(trainable))
    assert not any(np.any(after[name] != before[name]) for name in before if kept in name)
    moved = [
        name for name in after if changed in name and np.any(after[name] != before.get(name, 0))
    ]
    assert moved


def test_low_rank_updates_are_read_again(trained, tiny_config):
    workdir = trained("lora")
    expected = final_parameters(workdir)
    assert any(np.any(value) for name, value in expected.items() if "lora_b" in name)
    # A run that starts from the updates need not speak of them.
    goes_on = tiny_config(model__pretrained=str(workdir / "model"))
    for model in (
        runs.Run(workdir).policy(),
        runs.load_folder(workdir / "model"),
        models.load_model(goes_on),
    ):
        assert model.generator.config.unet.lora_rank == 2
        read = traverse_util.flatten_dict(stacking.split(model.parameters["unet"]), sep="/")
        assert read.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(read[name], value, err_msg=name)
    goes_on = tiny.changed(goes_on, model__lora_rank=3)
    with pytest.raises(
        UserError,
        match=r"config.model.lora_rank = 3: .*model has low-rank updates "
        r"of rank 2; give 2, or",
    ):
        models.load_model(goes_on)
    goes_on = tiny.changed(goes_on, model__lora_rank=2, model__lora_alpha=4.0)
    with pytest.raises(
        UserError,
        match=r"config.model.lora_alpha = 4.0: the low-rank updates of .*model "
        r"have alpha 16.0; give that, or 0",
    ):
        models.load_model(goes_on)


@pytest.mark.parametrize("alpha, expected", [(0.0, 16.0), (2.0, 2.0)])
def test_alpha_of_new_low_rank_updates_is_a_field(tiny_config, alpha, expected):
    config = tiny_config(model__lora_rank=2, model__lora_alpha=alpha)
    model = models.open_model(config)
    assert model.generator.config.unet.lora_alpha == expected
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    assert models.abstract_model(config, mesh)[0].config.unet.lora_alpha == expected


def test_accumulation_averages_over_buckets(tiny_config, tmp_path):
    loop.run(tiny_config(accumulate=2, batch_size=2, steps=2, **NOT_DRAWN), tmp_path)
    assert sorted(tiny.losses(tmp_path)) == [1, 2]


def test_a_run_that_is_shorter_than_its_warm_up_ends_in_it(tiny_config):
    schedule = state.learning_rate_schedule(
        tiny_config(steps=2, warmup_steps=10, decay="cosine", learning_rate=1.0)
    )
    assert [float(schedule(step)) for step in range(3)] == pytest.approx([0.0, 0.1, 0.2])


def test_a_step_is_reported_while_the_next_one_runs(tiny_config, tmp_path, monkeypatch):
    events, call = [], Step.__call__
    write = metric_writers.AsyncWriter.write_scalars
    monkeypatch.setattr(
        Step,
        "__call__",
        lambda step, *arguments: (
            events.append(f"start {arguments[-1] + 1}"),
            call(step, *arguments),
        )[1],
    )
    monkeypatch.setattr(
        metric_writers.AsyncWriter,
        "write_scalars",
        lambda writer, step, scalars: (
            events.append(f"report {step}"),
            write(writer, step, scalars),
        )[1],
    )
    loop.run(tiny_config(steps=5, checkpoint_every=3, **NOT_DRAWN), tmp_path)
    # Step 3 is reported before it is saved, and the last one before the end.
    assert events == [
        "start 1",
        "start 2",
        "report 1",
        "start 3",
        "report 2",
        "report 3",
        "start 4",
        "start 5",
        "report 4",
        "report 5",
    ]


def test_no_checkpoint_is_saved_before_the_lines_of_its_steps(tiny_config, tmp_path, monkeypatch):
    """A resumed run keeps those lines, and writes only later ones again."""
    write = writers.JsonLinesWriter.write_scalars

    def full(writer, step, scalars):
        if step == 2:
            raise UserError("metrics.jsonl cannot be written")
        write(writer, step, scalars)

    monkeypatch.setattr(writers.JsonLinesWriter, "write_scalars", full)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        loop.run(tiny_config(evaluation__pictures=0), tmp_path)  # Saves steps 2 and 4.
    assert list(tiny.losses(tmp_path)) == [1]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_nan_stops_the_run_and_keeps_the_checkpoint(trained, tiny_config, tmp_path):
    shutil.copytree(trained("adapter"), tmp_path, dirs_exist_ok=True)
    config = tiny_config(learning_rate=1e30, **NOT_DRAWN)
    (tmp_path / "config.json").unlink()  # Another learning rate is another run.
    with pytest.raises(UserError, match=r"at step 4\. The checkpoint of step 2 is intact"):
        loop.run(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]


def test_another_configuration_is_refused(finished, tiny_config):
    with pytest.raises(UserError, match=r"another config.beta = 100.0 \(now 7.0\)"):
        loop.run(tiny_config(beta=7.0), finished[0])


def test_another_configuration_is_accepted_with_accept_changes(finished, tiny_config, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    loop.run(tiny_config(beta=7.0, steps=2), tmp_path, accept_changes=True)
    assert json.loads((tmp_path / "config.json").read_text())["beta"] == 7.0
    # Fewer steps than there are make no fewer.
    assert left_by(tmp_path) == ({1, 2, 3, 4}, {2, 4}, {4})


def test_accepted_changes_of_sampling_change_the_images_of_the_base(
    finished, tiny_config, tmp_path
):
    def base():
        with np.load(tmp_path / "base.npz") as saved:
            return saved["shown"]

    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    first = base()
    changed = tiny_config(evaluation__pictures=1, sampling__steps=3)
    loop.run(changed, tmp_path, accept_changes=True)
    assert len(first) == 2 and len(base()) == 1
    assert not np.array_equal(base(), first[:1])


def left_by(workdir):
    """Returns (logged steps, saved steps, steps whose samples were generated) of a run."""
    saved = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    drawn = {
        int(path.stem.removeprefix("step_")) for path in (workdir / "samples").glob("step_*.png")
    }
    return set(tiny.losses(workdir)), saved, drawn


@pytest.mark.parametrize("every", [0, 100])
def test_intervals_of_zero_or_beyond_the_end_leave_the_last_step(tiny_config, tmp_path, every):
    loop.run(
        tiny_config(steps=3, log_every=every, checkpoint_every=every, sample_every=every), tmp_path
    )
    assert left_by(tmp_path) == ({3}, {3}, {3})


def test_samples_can_be_generated_during_training(tiny_config, tmp_path):
    loop.run(tiny_config(sample_every=3, evaluation__pictures=1, keep_checkpoints=1), tmp_path)
    assert left_by(tmp_path) == ({1, 2, 3, 4}, {4}, {3, 4})


def test_validation_scenes_are_measured_when_samples_are_generated(tiny_config, tmp_path):
    """The learning curve has the means that `measure` returns, and a resumed run replaces its points."""
    fields = {"sample_every": 2, "evaluation__pictures": 0, "evaluation__validation_scenes": 2}
    folder = with_probe(tiny_config, tmp_path)
    config = tiny_config(model__pretrained=str(folder), **fields)
    loop.run(config, tmp_path / "run")
    path = tmp_path / "run" / "validation.jsonl"
    curve = [json.loads(line) for line in path.read_text().splitlines()]
    assert [point["step"] for point in curve] == [2, 4]
    assert all(0 <= point["fidelity"] <= 1 and 0 <= point["missing"] <= 1 for point in curve)
    path.write_text(path.read_text() + json.dumps({"step": 5, "missing": 2.0}) + "\n")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    loop.run(config, tmp_path / "run")
    assert [json.loads(line) for line in path.read_text().splitlines()] == curve


def with_probe(tiny_config, tmp_path):
    """A model folder with a probe of random weights."""
    loop.run(tiny_config(objective="probe", steps=1), tmp_path / "probe")
    return tmp_path / "probe" / "model"


def test_validation_scenes_need_as_many_records(tiny_config):
    with pytest.raises(
        UserError,
        match="config.evaluation.validation_scenes = 3: there are only "
        "config.data.validation_size = 2",
    ):
        config_lib.check(tiny_config(evaluation__validation_scenes=3))


def test_saved_steps_are_logged_so_that_a_resumed_run_logs_the_same(tiny_config, tmp_path):
    intervals = {"log_every": 3, "checkpoint_every": 2, "evaluation__pictures": 0}
    loop.run(tiny_config(steps=5, **intervals), tmp_path / "whole")
    assert left_by(tmp_path / "whole") == ({2, 3, 4, 5}, {4, 5}, set())
    # As a run that was killed after step 4 has left it.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "5")
    loop.run(tiny_config(steps=5, **intervals), tmp_path / "killed")
    assert tiny.losses(tmp_path / "killed") == tiny.losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "number, name, status", [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_saves_and_exits(number, name, status, tiny_folder, tmp_path):
    workdir = tmp_path / "run"
    line = command(
        tiny_folder, workdir, "--config.steps=100000", "--config.checkpoint_every=100000"
    )
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, workdir, 3)
    asked = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert time.monotonic() - asked < 30
    assert process.returncode == status and "Traceback" not in errors
    step = max(tiny.losses(workdir))
    assert f"stopped by {name} after step {step} of 100000, which is saved" in errors
    assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()] == [str(step)]


def wait_for_steps(process, workdir, count):
    """Returns when a run has logged so many steps, or has ended."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.02)


def test_unwritable_workdir_is_one_clear_error(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run: cannot write there"):
        loop.run(tiny_config(), tmp_path / "file" / "run")


def test_killed_run_resumes_exactly(finished, tiny_folder, tmp_path):
    line = command(tiny_folder, tmp_path / "run", "--config.evaluation.pictures=0")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_steps(process, tmp_path / "run", 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(line, check=True, capture_output=True)
    assert tiny.losses(tmp_path / "run") == tiny.losses(finished[0])


def test_mistakes_on_the_command_line_are_one_line(tiny_folder, tmp_path):
    for override, message in [
        ("--config.beta=-1.0", "error: config.beta = -1.0: give a number > 0"),
        ("--config.model.pretrained=nowhere", "error: config.model.pretrained = 'nowhere'"),
        ("--config.betta=3", "error: config.betta is not a field. Did you mean"),
        (
            "--config=nowhere.py",
            "error: --config=nowhere.py: there is no such file. Names that need no path: ",
        ),
        ("--config.beta=abc", "error: flag --config.beta=abc: could not convert"),
    ]:
        result = subprocess.run(
            command(tiny_folder, tmp_path, override), capture_output=True, text=True
        )
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and errors[0].startswith(message)
        assert "Traceback" not in result.stderr


WITHOUT = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def blocked(name, path=None, target=None):
    if name.split(".")[0] in {packages!r}:
        return None
    return find(name, path, target)
importlib.machinery.PathFinder.find_spec = blocked
"""


def run_without(packages, folder, workdir):
    """Standard error of the tiny run, in a process in which these packages cannot be imported."""
    program = WITHOUT.format(packages=packages) + (
        "import runpy\nsys.argv = sys.argv[1:]\n"
        "runpy.run_module('focusdpo_jax.main', run_name='__main__')\n"
    )
    line = command(folder, workdir)
    result = subprocess.run(
        [line[0], "-c", program, "main", *line[3:]], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stderr


def test_trains_without_tensorflow(finished, tiny_folder, tmp_path):
    errors = run_without(("tensorflow",), tiny_folder, tmp_path)
    assert errors.count("TensorFlow is not installed: TensorBoard events are written") == 1
    assert "TensorBoard events are not written" not in errors
    assert "step 4/4  loss " in errors
    assert tiny.losses(tmp_path) == tiny.losses(finished[0])
    read = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    logged = [float(tensor_util.make_ndarray(e.tensor_proto)) for e in read.Tensors("loss")]
    assert logged == pytest.approx(list(tiny.losses(finished[0]).values()))
    assert {"samples", "focus"} < set(read.Tags()["tensors"])


def test_trains_without_tensorboard(finished, tiny_folder, tmp_path):
    errors = run_without(("tensorflow", "tensorboard"), tiny_folder, tmp_path)
    assert errors.count("TensorBoard events are not written, because tensorboard is missing") == 1
    assert not list(tmp_path.glob("events*"))
    assert tiny.losses(tmp_path) == tiny.losses(finished[0])


def test_steps_are_traced(finished, tiny_config, tmp_path):
    """The trace has the requested number of complete updates, and the run's metrics do not change."""
    loop.run(tiny_config(evaluation__pictures=0), tmp_path, profile_steps=2)
    (path,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    operations = collections.Counter(
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if ("hlo_module", "jit_update") in event.stats
    )
    # A few are parts of loops, or split among threads.
    assert len(operations) > 100 and statistics.mode(operations.values()) == 2
    assert tiny.losses(tmp_path) == tiny.losses(finished[0])


def test_a_trace_is_cut_off_by_the_end_of_a_run(tiny_config, tmp_path):
    loop.run(tiny_config(steps=1, evaluation__pictures=0), tmp_path, profile_steps=5)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_no_trace_without_the_flag(finished):
    assert not (finished[0] / "plugins").exists()


def test_weights_and_biases_is_checked_before_anything_is_built(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"^--wandb_project=study: wandb is missing \(pip install wandb\)$"
    ):
        loop.run(tiny_config(), tmp_path / "run", wandb_project="study")
    assert not (tmp_path / "run").exists()


def test_imports_without_tensorflow():
    rooms = (
        "main",
        "focus.losses",
        "diffusion.samplers",
        "models.generator",
        "training.loop",
        "data.loader",
        "toybox.probe",
    )
    program = (
        WITHOUT.format(packages=("tensorflow", "tensorboard"))
        + "".join(f"import focusdpo_jax.{room}\n" for room in rooms)
        + ("assert not any(name.split('.')[0] == 'tensorflow' for name in sys.modules)\n")
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_state_keeps_no_frozen_parameters(tiny_folder):
    from focusdpo_jax.models.generator import merge_parameters, split_parameters

    config = tiny.tiny_config(tiny_folder)
    parameters = models.load_model(config).parameters
    trainable, frozen = split_parameters(parameters, "adapter")
    assert set(trainable) == {"adapter", "unet"} and "vae" in frozen
    merged = merge_parameters(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(parameters)


def test_supervised_runs_reuse_their_encodings(tiny_config, tmp_path):
    """Also with Toybox: a run of chosen images only and one of both have separate folders."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_config().data.path, folder)
    shutil.rmtree(folder / "encoded", ignore_errors=True)

    def run(name, share):
        config = tiny_config(
            objective="subject_sft",
            rejected_share=share,
            steps=1,
            data__path=str(folder),
            evaluation__pictures=0,
        )
        loop.run(config, tmp_path / name)
        return {
            path.name: {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
            for path in (folder / "encoded").iterdir()
        }

    first = run("first", 0.0)
    assert len(first) == 1
    assert run("second", 0.0) == first
    assert len(run("third", 0.5)) == 2
    assert tiny.losses(tmp_path / "second") == tiny.losses(tmp_path / "first")


@pytest.mark.parametrize("cache, tables", [(True, 0), (False, 2)])
def test_encoders_leave_the_device_when_everything_is_encoded(tiny_config, tmp_path, cache, tables):
    def held():
        """Embedding tables of the vocabulary on the device."""
        gc.collect()
        return sum(x.shape == (573, 8) for x in jax.live_arrays())

    before = held()
    task = builders.make_task(tiny_config(data__cache=cache), tmp_path)
    assert set(task.definition.frozen["parameters"]) == {"unet"}
    assert held() - before == tables
    batch = task.prepare(next(task.batches))
    assert batch.text.shape == (4, 16, 16) and batch.pooled.shape == (4, 8)
