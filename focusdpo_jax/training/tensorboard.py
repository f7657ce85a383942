"""TensorBoard's events, by TensorBoard's own writer: one event for all numbers of a step.

TensorFlow's summaries, which others are built upon, take a millisecond for each number.
"""

import contextlib
import itertools
import os
import socket
import time

from absl import logging

from focusdpo_jax.data import images
from focusdpo_jax.files import room_for

_NUMBERS = itertools.count()  # Of the files of this process.


def open_events(folder):
    """An `Events` in a folder, or None where TensorBoard is not installed."""
    try:
        return Events(folder)
    except ImportError as error:
        logging.warning(
            "TensorBoard events are not written, because %s is missing (pip install tensorboard).",
            error.name or "tensorboard",
        )
        return None


class Events:
    """A file of events.

    Raises:
      ImportError: there is no TensorBoard.
    """

    def __init__(self, folder):
        """Opens a new file in `folder`."""
        # Its imports take seconds where TensorFlow is there, which it then opens files with.
        from tensorboard.compat import tf
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # Named as by its EventFileWriter, whose thread would print a traceback where the disk is full.
        self._path = os.path.join(
            str(folder),
            f"events.out.tfevents.{int(time.time()):010d}."
            f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}",
        )
        with room_for(self._path):
            self._writer = RecordWriter(tf.io.gfile.GFile(self._path, "wb"))
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step, values):
        """Writes a dict of numbers for `step`."""
        self._add(
            step,
            [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()],
        )

    def picture(self, step, name, image):
        """Writes a uint8 picture [H, W, 3] for `step`."""
        height, width, channels = image.shape
        self._add(
            step,
            [
                self._summary.Value(
                    tag=name,
                    image=self._summary.Image(
                        height=height,
                        width=width,
                        colorspace=channels,
                        encoded_image_string=images.encode_png(image),
                    ),
                )
            ],
        )

    def close(self):
        """Closes the file."""
        with contextlib.suppress(
            Exception
        ):  # All events are written; a full disk was reported before.
            self._writer.close()

    def _add(self, step, values):
        self._write(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        )

    def _write(self, event):
        with room_for(self._path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()
