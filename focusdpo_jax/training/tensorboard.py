"""TensorBoard's events, by TensorBoard's own writer: one event for all numbers of a step.

TensorFlow's summaries, which others are built upon, take a millisecond for each number.
"""

import time

from absl import logging

from focusdpo_jax.data import images


def open_events(folder):
    """An `Events` in a folder, or None where TensorBoard is not installed."""
    try:
        return Events(folder)
    except ImportError as error:
        logging.warning("TensorBoard events are not written, because %s is missing "
                        "(pip install tensorboard).", error.name or "tensorboard")
        return None


class Events:
    """A file of events.

    Raises:
      ImportError: there is no TensorBoard.
    """

    def __init__(self, folder):
        """Opens a new file in `folder`."""
        # Its imports take seconds where TensorFlow is there, which it then opens files with.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import event_file_writer
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = event_file_writer.EventFileWriter(str(folder))

    def scalars(self, step, values):
        """Writes a dict of numbers for `step`."""
        self._add(step, [self._summary.Value(tag=name, simple_value=value)
                         for name, value in values.items()])

    def picture(self, step, name, image):
        """Writes a uint8 picture [H, W, 3] for `step`."""
        height, width, channels = image.shape
        self._add(step, [self._summary.Value(tag=name, image=self._summary.Image(
            height=height, width=width, colorspace=channels,
            encoded_image_string=images.encode_png(image)))])

    def close(self):
        """Closes the file."""
        self._writer.close()

    def _add(self, step, values):
        self._writer.add_event(self._event(
            wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()
