"""Toybox's test scenes as a benchmark: reference files, and the probe as a scorer."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from etils import epath

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.data.record import Source
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.evaluation.scoring import Regions, Scores
from focusdpo_jax.sharding.mesh import inference_mesh, replicate, shard_batch
from focusdpo_jax.toybox import metrics as toybox_metrics
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read
from focusdpo_jax.vision import encoders
from focusdpo_jax.visualization import grids

_TRUTH = ("class_id", "hue", "pattern", "pattern_hue", "part")


def write_scenes(
    source: Source,
    count: int,
    folder: epath.PathLike,
    *,
    samples: int,
    seed: int,
) -> list[BenchmarkScene]:
    """Returns the first `count` scenes of a source of Toybox records; writes their references.

    Args:
      source: Toybox records (`data.dataset.ToyboxSource`).
      count: number of scenes.
      folder: folder of the references as PNG files; existing files are kept.
      samples: images of each scene.
      seed: seed of the first image; image i has seed + i.

    Returns:
      A list of BenchmarkScene; every scene is its own group.
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
    """Compares the probe's readings with the ground truth (see `toybox.metrics`)."""

    def __init__(self, probe: Any, source: Source, slots: int, batch_size: int):
        """Takes the probe's parameters.

        Args:
          probe: parameters of the probe network.
          source: records of the scenes.
          slots: largest number of subjects of a scene.
          batch_size: images at once.
        """
        self.name = f"probe-{encoders.digest_of(probe)}"
        self._mesh, self._source = inference_mesh(batch_size), source
        self._probe = replicate(probe, self._mesh)
        self._slots, self._batch_size = slots, batch_size
        self._read = jax.jit(
            lambda p, x: read(cast(Any, Probe(TOYBOX).apply({"params": p}, x / 255.0)))
        )

    def score(
        self, scenes: Sequence[BenchmarkScene], images: Sequence[RGBImage], regions: Regions
    ) -> list[Scores]:
        """Scores images; see `scoring.Scorer.score`. Regions are not used.

        Raises:
          UserError: an image has another size than the scenes, at which the probe was trained.
        """
        side = self._batch_size
        wanted = self._source[int(scenes[0].group)]["chosen"].shape
        for scene, image in zip(scenes, images, strict=True):
            if image.shape != wanted:
                raise UserError(
                    f"the image of scene {scene.name} has {image.shape[1]} x {image.shape[0]} pixels "
                    f"and Toybox's probe reads {wanted[1]} x {wanted[0]}; resize the images"
                )
        batch = np.stack(images)
        batch = np.concatenate([batch, np.repeat(batch[-1:], side - len(batch), axis=0)])
        readings = self._read(self._probe, shard_batch(batch, self._mesh))
        readings = jax.tree.map(lambda x: np.asarray(x)[: len(images)], readings)
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


def _plain(value: Any) -> Any:
    if np.ndim(value):
        return [_plain(v) for v in value]
    return None if np.isnan(value) else float(value)
