"""Writers of a run's scalars and images: JSON lines, TensorBoard events, Weights & Biases.

Each is a `clu.metric_writers.MetricWriter`. `open_writer` combines them and runs them in a thread,
in the order of the calls, so that the training loop does not wait for a disk or a network.

Training scalars have plain names (`loss`), or those of a bucket (`t750-999/loss`). Means over
validation scenes start with `validation/`, those of the final evaluation with `evaluation/`.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import socket
import time
from typing import cast

import numpy as np
from absl import logging
from clu import asynclib
from etils import epath

from focusdpo_jax.data import images as image_files
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file, room_for
from focusdpo_jax.sharding import processes
from focusdpo_jax.training.clu_without_tensorflow import metric_writers

VALIDATION = "validation/"
EVALUATION = "evaluation/"

_NUMBERS = itertools.count()  # Makes the names of this process's event files unique.


@contextlib.contextmanager
def open_writer(workdir, *, start_step=0, wandb_project=None, config=None):
    """Opens the writers of a run; all values are on disk when the context ends.

    An error of a writer, such as a full disk, is raised by the next call of the yielded writer, at
    the latest by its `flush` or at the end of the context.

    Args:
      workdir: folder of the run.
      start_step: step after which the run resumes; see `JsonLinesWriter`.
      wandb_project: project of Weights & Biases, or None.
      config: configuration for Weights & Biases, a nested dict.

    Yields:
      A `MetricWriter`; on all processes but the first, one that does nothing.

    Raises:
      UserError: a file cannot be written, or Weights & Biases cannot start.
    """
    if not processes.is_first():
        yield NullWriter()
        return
    parts = [JsonLinesWriter(workdir, start_step=start_step), TensorBoardWriter(workdir)]
    if wandb_project:
        parts.append(WandbWriter(workdir, wandb_project, config))
    writer = metric_writers.AsyncWriter(metric_writers.MultiWriter(parts))
    try:
        yield writer
        writer.flush()
    except asynclib.AsyncError as error:
        cause = _cause(error)
        raise cause from cause.__cause__
    finally:
        # Either everything is flushed, or the first error is being raised.
        with contextlib.suppress(asynclib.AsyncError):
            writer.close()


def _cause(error):
    """Returns the original error that an `AsyncError` wraps, once or twice."""
    while isinstance(error, asynclib.AsyncError) and error.__cause__ is not None:
        error = error.__cause__
    return error


class NullWriter(metric_writers.MetricWriter):
    """Ignores all values. The other writers override the methods for the values that they write."""

    def write_summaries(self, step, values, metadata=None):
        """See `MetricWriter`."""

    def write_scalars(self, step, scalars):
        """See `MetricWriter`."""

    def write_images(self, step, images):
        """See `MetricWriter`."""

    def write_videos(self, step, videos):
        """See `MetricWriter`."""

    def write_audios(self, step, audios, *, sample_rate):
        """See `MetricWriter`."""

    def write_texts(self, step, texts):
        """See `MetricWriter`."""

    def write_histograms(self, step, arrays, num_buckets=None):
        """See `MetricWriter`."""

    def write_hparams(self, hparams):
        """See `MetricWriter`."""

    def flush(self):
        """See `MetricWriter`."""

    def close(self):
        """See `MetricWriter`."""


class JsonLinesWriter(NullWriter):
    """Writes `metrics.jsonl`, a line per logged step, and `validation.jsonl`, one per validation.

    A run that resumes after step N removes the lines of later steps from `metrics.jsonl`, since it
    writes them again. A validation replaces the lines of its own step and of later ones. Scalars of
    the final evaluation are in `results.json` and not written here.
    """

    def __init__(self, workdir, *, start_step=0):
        """Opens `metrics.jsonl` and removes its lines after `start_step`."""
        workdir = epath.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        self._validation = workdir / "validation.jsonl"
        kept = []
        if start_step and self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line)
                except ValueError:  # The last line of a killed process may be incomplete.
                    break
        replace_file(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a")

    def write_scalars(self, step, scalars):
        """Writes the scalars of one call as one line, and flushes the file."""
        training = {k: v for k, v in scalars.items() if not k.startswith((VALIDATION, EVALUATION))}
        if training:
            with room_for(self._path):
                self._file.write(_line(step, training))
                self._file.flush()
        means = {
            name.removeprefix(VALIDATION): value
            for name, value in scalars.items()
            if name.startswith(VALIDATION)
        }
        if means:
            path = self._validation
            lines = path.read_text().splitlines() if path.exists() else []
            lines = [line + "\n" for line in lines if json.loads(line)["step"] < step]
            replace_file(path, "".join(lines) + _line(step, means))

    def close(self):
        """Closes the file."""
        # Every line was flushed. If the disk was full, that error was raised before.
        with contextlib.suppress(OSError):
            self._file.close()


def _line(step, scalars):
    """Returns a line with one JSON object; NumPy and JAX scalars are converted to Python's."""
    return json.dumps({"step": step, **scalars}, default=lambda value: value.item()) + "\n"


class TensorBoardWriter(NullWriter):
    """Writes TensorBoard events, one for all scalars of a call.

    Requires TensorBoard but not TensorFlow. TensorFlow's summaries, which
    `clu.metric_writers.SummaryWriter` writes, take a millisecond per scalar.
    """

    def __init__(self, folder):
        """Initialises it; the file is opened at the first event, since importing takes seconds."""
        self._folder = folder

    @functools.cached_property
    def _events(self):
        try:
            return _Events(self._folder)
        except ImportError as error:
            logging.warning(
                "TensorBoard events are not written, because %s is missing (pip install "
                "tensorboard).",
                error.name or "tensorboard",
            )
            return None

    def write_scalars(self, step, scalars):
        """Writes scalars, each under its name."""
        events = cast("_Events | None", self._events)
        if events:
            events.scalars(step, scalars)

    def write_images(self, step, images):
        """Writes uint8 images [H, W, C], or [N, H, W, C] under "name/0" and so on; C is 1 or 3."""
        events = cast("_Events | None", self._events)
        if not events:
            return
        for name, image in images.items():
            image = np.asarray(image)
            if image.ndim == 3:
                events.image(step, name, image)
            else:
                for i, one in enumerate(image):
                    events.image(step, f"{name}/{i}", one)

    def close(self):
        """Closes the file."""
        events = self.__dict__.get("_events")
        if events:
            events.close()


class _Events:
    """A file of TensorBoard events.

    Raises:
      ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder):
        """Opens a new file in `folder`."""
        # This module is TensorFlow if that is installed, and otherwise TensorBoard's substitute.
        from tensorboard.compat import tf
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        if getattr(tf, "__version__", "stub") == "stub":
            logging.info(
                "TensorFlow is not installed: TensorBoard events are written without it. It is "
                "needed only for run folders in a bucket (gs://)."
            )
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # The name is that of TensorBoard's EventFileWriter, which is not used because its thread
        # prints a traceback if the disk is full.
        self._path = os.path.join(
            str(folder),
            f"events.out.tfevents.{int(time.time()):010d}."
            f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}",
        )
        with room_for(self._path):
            self._records = RecordWriter(tf.io.gfile.GFile(self._path, "wb"))
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step, values):
        """Writes a dict of scalars."""
        summary = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
        ]
        self._add(step, summary)

    def image(self, step, name, image):
        """Writes a uint8 image [H, W, C]."""
        height, width, channels = image.shape
        image = self._summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=image_files.encode_png(image),
        )
        self._add(step, [self._summary.Value(tag=name, image=image)])

    def close(self):
        """Closes the file."""
        # All events were flushed; a full disk was reported before.
        with contextlib.suppress(Exception):
            self._records.close()

    def _add(self, step, values):
        self._write(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        )

    def _write(self, event):
        with room_for(self._path):
            self._records.write(event.SerializeToString())
            self._records.flush()


class WandbWriter(NullWriter):
    """Logs scalars and images to a run of Weights & Biases.

    The id of that run is stored in `wandb_run.txt`, so that a resumed run continues it. `step` is
    logged as a metric instead of W&B's own counter, which must not decrease: a resumed run logs the
    steps after its checkpoint again.
    """

    def __init__(self, workdir, project, config=None):
        """Starts the run; WANDB_* variables configure it (offline, entity, ...).

        Raises:
          UserError: wandb is missing, or does not start.
        """
        wandb, workdir = import_wandb(project), epath.Path(workdir)
        kept = workdir / "wandb_run.txt"
        local = "://" not in str(workdir)
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=kept.read_text().strip() if kept.exists() else None,
                resume="allow",
                dir=str(workdir) if local else None,
                config=config,
            )
        except Exception as error:  # wandb has many error types: login, network, project, ...
            reason = " ".join(str(error).split()) or repr(error)
            raise UserError(f"--wandb_project={project}: {reason}") from error
        self._image = wandb.Image
        replace_file(kept, f"{self._run.id}\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step, scalars):
        """Logs scalars under their names."""
        self._run.log({"step": step, **scalars})

    def write_images(self, step, images):
        """Logs images, uint8 [H, W, C]."""
        self._run.log({"step": step} | {k: self._image(np.asarray(v)) for k, v in images.items()})

    def close(self):
        """Ends the run; waits until everything is sent."""
        self._run.finish()


def import_wandb(project):
    """Imports and returns the package wandb.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb_project={project}: {error.name or 'wandb'} is missing (pip install wandb)"
        ) from error
