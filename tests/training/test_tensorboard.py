import numpy as np
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from focusdpo_jax.data import images
from focusdpo_jax.training.tensorboard import open_events


def test_tensorboard_reads_what_was_written(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    events = open_events(tmp_path)
    events.scalars(3, {"loss": 0.5, "bucket/loss": 2})
    events.scalars(4, {"loss": 0.25})
    events.picture(4, "samples", picture)
    events.close()
    read = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [
        (e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in read.Tensors("loss")
    ] == [(3, 0.5), (4, 0.25)]
    assert set(read.Tags()["tensors"]) == {"loss", "bucket/loss", "samples"}
    (image,) = read.Tensors("samples")
    width, height, content = tensor_util.make_ndarray(image.tensor_proto)[:3]
    assert (image.step, int(width), int(height)) == (4, 7, 5)
    np.testing.assert_array_equal(images.decode_png(content), picture)
