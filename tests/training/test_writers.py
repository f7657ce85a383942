"""Where scalars and images go: JSON lines, TensorBoard, Weights & Biases, and errors of the writers."""

import json
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from focusdpo_jax.data import images
from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import processes
from focusdpo_jax.training import writers
from focusdpo_jax.training.clu_without_tensorflow import metric_writers

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboard_reads_what_was_written(tmp_path):
    with writers.open_writer(tmp_path) as writer:
        assert isinstance(writer, metric_writers.AsyncWriter)
        writer.write_scalars(3, {"loss": 0.5, "bucket/loss": 2})
        writer.write_scalars(4, {"loss": np.float32(0.25)})
        writer.write_scalars(4, {"validation/missing": 0.5, "evaluation/missing_base": 0.75})
        writer.write_images(4, {"samples": IMAGE, "both": np.stack([IMAGE, IMAGE])})
    read = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [
        (e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in read.Tensors("loss")
    ] == [(3, 0.5), (4, 0.25)]
    assert set(read.Tags()["tensors"]) == {
        "loss",
        "bucket/loss",
        "validation/missing",
        "evaluation/missing_base",
        "samples",
        "both/0",
        "both/1",
    }
    (image,) = read.Tensors("samples")
    width, height, content = tensor_util.make_ndarray(image.tensor_proto)[:3]
    assert (image.step, int(width), int(height)) == (4, 7, 5)
    np.testing.assert_array_equal(images.decode_png(content), IMAGE)


def test_each_kind_of_scalars_has_its_file(tmp_path):
    with writers.open_writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write_scalars(step, {"loss": 0.5, "t750-999/loss": np.float32(step)})
            writer.write_scalars(step, {"validation/missing": step / 4})
        writer.write_scalars(2, {"evaluation/missing_base": 0.75})
        writer.write_scalars(1, {"validation/missing": 0.125})
    # A call is a line; the final evaluation has results.json.
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "t750-999/loss": 1.0},
        {"step": 2, "loss": 0.5, "t750-999/loss": 2.0},
    ]
    # A validation replaces those of its step and of later ones.
    assert lines(tmp_path / "validation.jsonl") == [{"step": 1, "missing": 0.125}]


def test_a_resumed_run_drops_later_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with writers.open_writer(tmp_path, start_step=1) as writer:
        writer.write_scalars(2, {"loss": 5.0})
    assert lines(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 5.0}]
    with writers.open_writer(tmp_path) as writer:
        pass
    assert lines(path) == []


def test_a_flush_waits_for_the_thread(tmp_path, monkeypatch):
    release, write = threading.Event(), writers.JsonLinesWriter.write_scalars

    def slow(self, step, scalars):
        release.wait(10)
        write(self, step, scalars)

    monkeypatch.setattr(writers.JsonLinesWriter, "write_scalars", slow)
    with writers.open_writer(tmp_path) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        assert lines(tmp_path / "metrics.jsonl") == []  # The caller did not wait.
        threading.Timer(0.1, release.set).start()
        writer.flush()
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_the_first_error_of_the_thread_stops_the_run(tmp_path, monkeypatch):
    error = UserError("a/metrics.jsonl cannot be written")

    def broken(*_):
        raise error

    monkeypatch.setattr(writers.JsonLinesWriter, "write_scalars", broken)
    with pytest.raises(UserError) as raised, writers.open_writer(tmp_path) as writer:
        for step in range(1000):
            writer.write_scalars(step, {"loss": 1.0})
        writer.flush()
        pytest.fail("went on")
    assert raised.value is error


def test_an_error_of_the_body_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.JsonLinesWriter, "write_scalars", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="loss = nan"), writers.open_writer(tmp_path) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        raise UserError("loss = nan")


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with writers.open_writer(tmp_path, wandb_project="p") as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_images(1, {"samples": IMAGE})
        writer.flush()
    assert isinstance(writer, writers.NullWriter) and not list(tmp_path.iterdir())


class FakeWandb(types.ModuleType):
    """Records what the real package would be given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.metrics, self.logged, self.finished = [], [], [], 0
        self.id, self.Image = "abc123", lambda image: ("image", image.shape)

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, *names, **settings):
        self.metrics.append((*names, settings))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_scalars_and_images(tmp_path, wandb):
    config = {"seed": 0, "data": {"source": "toybox"}}
    folder = tmp_path / "toybox_dpo"
    with writers.open_writer(folder, wandb_project="study", config=config) as writer:
        writer.write_scalars(3, {"loss": 0.5})
        writer.write_images(4, {"samples": IMAGE})
    assert wandb.started == [
        {
            "project": "study",
            "name": "toybox_dpo",
            "id": None,
            "resume": "allow",
            "dir": str(folder),
            "config": {"seed": 0, "data": {"source": "toybox"}},
        }
    ]
    assert wandb.logged == [
        {"step": 3, "loss": 0.5},
        {"step": 4, "samples": ("image", (5, 7, 3))},
    ]
    assert wandb.metrics == [("step", {}), ("*", {"step_metric": "step"})] and wandb.finished == 1
    # The others write as ever.
    assert lines(folder / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]
    assert list(folder.glob("events.out.tfevents.*"))
    # A run that goes on goes on there, too.
    with writers.open_writer(folder, start_step=3, wandb_project="study", config=config):
        pass
    assert wandb.started[1]["id"] == "abc123"


def test_weights_and_biases_that_does_not_start_is_one_line(tmp_path, wandb):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login(key=...)")

    wandb.init = init
    with pytest.raises(
        UserError,
        match=r"^--wandb_project=study: api_key not configured \(no-tty\). call wandb.login",
    ):
        with writers.open_writer(tmp_path, wandb_project="study"):
            pytest.fail("went on")


def test_clu_does_not_import_tensorflow():
    """In a process where it is installed; CLU's own summary writer can still be created."""
    program = (
        "import sys\n"
        "import focusdpo_jax.training.loop\n"
        "assert 'tensorflow' not in sys.modules and 'tensorboard' not in sys.modules\n"
        "from clu import metric_writers\n"
        "import tempfile\n"
        "folder = tempfile.mkdtemp()\n"
        "writer = metric_writers.SummaryWriter(folder)\n"
        "print(type(writer).__module__, 'tensorflow' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "clu.metric_writers.tf.summary_writer True\n", result.stderr[-2000:]
