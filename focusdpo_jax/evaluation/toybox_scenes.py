"""Toybox's test scenes as a benchmark: their references as files, and the probe as the scorer."""

import jax
import numpy as np
from etils import epath

from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.sharding.mesh import drawing_mesh, replicate, shard_batch
from focusdpo_jax.toybox import metrics as toybox_metrics
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read
from focusdpo_jax.vision import encoders
from focusdpo_jax.visualization import grids

_TRUTH = ("class_id", "hue", "pattern", "pattern_hue", "part")


def write_scenes(source, count, folder, *, samples, seed):
    """The first `count` scenes of a source of Toybox records.

    Args:
      source: of records (`data.dataset.ToyboxSource`).
      folder: where the references are written as PNG, unless they are there.
      samples: images of each scene.
      seed: of the first image; each further one has one more.

    Returns:
      A list of BenchmarkScene; every scene is a group of its own.
    """
    folder, scenes = epath.Path(folder), []
    for index in range(count):
        record, subjects = source[index], []
        for i, subject in enumerate(record["subjects"]):
            path = folder / f"{index:04d}_{i}.png"
            if not path.exists():
                grids.save_png(path, subject["reference"])
            subjects.append(
                BenchmarkSubject(subject["phrase"], subject["phrase"], str(path), (str(path),))
            )
        for sample in range(samples):
            scenes.append(
                BenchmarkScene(
                    f"{index:04d}_{sample}",
                    record["caption"],
                    tuple(subjects),
                    seed + len(scenes),
                    f"{index:04d}",
                )
            )
    return scenes


class ToyboxScorer:
    """What the probe reads off images, compared with the truth (see `toybox.metrics`)."""

    def __init__(self, probe, source, slots, batch_size):
        """Args: the probe's parameters; the source of records; the most subjects of a scene."""
        self.name = f"probe-{encoders.digest_of(probe)}"
        self._mesh, self._source = drawing_mesh(batch_size), source
        self._probe = replicate(probe, self._mesh)
        self._slots, self._batch_size = slots, batch_size
        self._read = jax.jit(lambda p, x: read(Probe(TOYBOX).apply({"params": p}, x / 255.0)))

    def score(self, scenes, drawn, regions):
        """{measure: list of a value a subject, or a value}, None where it is not defined."""
        side = self._batch_size
        images = np.stack(drawn)
        images = np.concatenate([images, np.repeat(images[-1:], side - len(images), axis=0)])
        readings = self._read(self._probe, shard_batch(images, self._mesh))
        readings = jax.tree.map(lambda x: np.asarray(x)[: len(drawn)], readings)
        records = [self._source[int(scene.group)] for scene in scenes]
        present = np.array([[i < len(r["subjects"]) for i in range(self._slots)] for r in records])
        truth = {
            name: np.array(
                [
                    [s[name] for s in r["subjects"]] + [0] * (self._slots - len(r["subjects"]))
                    for r in records
                ]
            )
            for name in _TRUTH
        }
        truth["background"] = np.array([r["background"] for r in records])
        measured = toybox_metrics.compute(readings, truth, present)
        return [
            {name: _plain(values[row]) for name, values in measured.items()}
            for row in range(len(scenes))
        ]


def _plain(value):
    if np.ndim(value):
        return [_plain(v) for v in value]
    return None if np.isnan(value) else float(value)
