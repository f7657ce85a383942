"""The benchmarks: Toybox's test scenes, and DreamBench or lists of scenes with photographs.

All inputs are checked in the constructors, before any image is generated.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from focusdpo_jax.config import RunConfig
from focusdpo_jax.data import dataset
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import dreambench, scoring, toybox_scenes
from focusdpo_jax.evaluation import scenes as scene_files
from focusdpo_jax.evaluation.output_folder import OutputFolder
from focusdpo_jax.evaluation.scenes import BenchmarkScene
from focusdpo_jax.models import truncation
from focusdpo_jax.models.parameters import Params, flatten
from focusdpo_jax.vision import encoders


class Benchmark(Protocol):
    """The interface of a benchmark for `runner.run`.

    Attributes:
      settings: JSON values that determine the scenes and how they are measured.
      about: one sentence for the report.
      scorers: compute the metrics.
      region_scorer: finds the regions of subjects, or None.
    """

    settings: dict[str, Any]
    about: str
    scorers: list[scoring.Scorer]
    region_scorer: scoring.RegionScorer | None

    def scenes(self, folder: OutputFolder) -> list[BenchmarkScene]:
        """Returns the scenes; may write their references to `folder`."""
        ...


def _digest(parameters: Params) -> str:
    """Returns a digest of parameters: measures of two probes are not comparable."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(parameters).items()):
        digest.update("/".join(path).encode() + np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:12]


class ToyboxBenchmark:
    """Test scenes of the procedural world, whose ground truth is known."""

    region_scorer: scoring.RegionScorer | None = None

    def __init__(
        self,
        config: RunConfig,
        probe: dict | None,
        *,
        samples: int,
        seed: int,
        limit: int | None,
        batch_size: int,
    ):
        """Takes the world and the number of scenes from a run's configuration.

        Args:
          config: RunConfig; it reads `data`, `resolution` and `evaluation`.
          probe: parameters of the probe network, or None.
          samples: images of each scene.
          seed: seed of the noise.
          limit: largest number of images, or None.
          batch_size: images scored at once.

        Raises:
          UserError: the configuration's data source is not Toybox, it has no scenes, or there is no
            probe.
        """
        if config.data.source != "toybox":
            raise UserError(
                f"config.data.source = {config.data.source!r}: there is no ground truth for "
                "your own images; give --dreambench or --scenes."
            )
        if not config.evaluation.scenes:
            raise UserError(
                "config.evaluation.scenes = 0: give --config.evaluation.scenes=192 "
                "(with --config), or --dreambench or --scenes."
            )
        if probe is None:
            raise UserError(
                f"config.model.pretrained = {config.model.pretrained!r} has no "
                "probe.safetensors, which reads Toybox's images; start from a model "
                "that has it, such as toybox."
            )
        self._world = dataset.toybox_world(config)
        self._count = config.evaluation.scenes
        if limit is not None:
            self._count = min(self._count, -(-limit // samples))
        self._source = dataset.ToyboxSource(self._world, "test", self._count)
        self._samples, self._seed, self._limit = samples, seed, limit
        self.scorers: list[scoring.Scorer] = [
            toybox_scenes.ToyboxScorer(probe, self._source, self._world.max_subjects, batch_size)
        ]
        self.settings: dict[str, Any] = {
            "benchmark": "toybox",
            "world": dataclasses.asdict(self._world),
            "scenes": self._count,
            "samples": samples,
            "seed": seed,
            "limit": limit,
            "probe": _digest(probe),
        }
        self.about = (
            f"Toybox: {self._count} test scenes with subjects never trained on, read "
            "by the probe network; a group is a scene."
        )

    def scenes(self, folder: OutputFolder) -> list[BenchmarkScene]:
        """Returns the scenes; writes their references to `folder`."""
        return toybox_scenes.write_scenes(
            self._source,
            self._count,
            folder.path / "references",
            samples=self._samples,
            seed=self._seed,
        )[: self._limit]


class PhotographBenchmark:
    """DreamBench's subjects, one or several in a scene, compared with their photographs."""

    def __init__(
        self,
        folder: epath.PathLike | None,
        scenes: epath.PathLike | None,
        *,
        protocol: str,
        samples: int,
        seed: int,
        limit: int | None,
        networks: Mapping[str, str | None],
        batch_size: int,
    ):
        """Reads the scenes and loads the networks.

        Args:
          folder: DreamBench's dataset folder; may be None if `scenes` is given.
          scenes: JSON file in UNO's layout, or None for every subject with every prompt.
          protocol, samples, seed: see `dreambench.single`.
          limit: largest number of images, or None.
          networks: {"dino", "dinov2", "clip": folder or None}; at least one.
          batch_size: images scored at once.

        Raises:
          UserError: the scenes cannot be read, or no network is given.
        """
        if not any(networks.values()):
            raise UserError(
                "give --dinov2, --dino or --clip, the folder of a network to measure "
                "with; docs/evaluation.md lists where to get them."
            )
        how = {"protocol": protocol, "samples": samples, "seed": seed}
        if scenes is None:
            self._scenes = dreambench.single(folder, **how)
        else:
            self._scenes = dreambench.listed(scenes, folder, **how)
        self._scenes = self._scenes[:limit]
        self.scorers, self.region_scorer = _load_scorers(networks, batch_size, self._scenes)
        digest = hashlib.sha256(
            json.dumps([dataclasses.asdict(scene) for scene in self._scenes]).encode()
        ).hexdigest()[:12]
        self.settings: dict[str, Any] = {
            "benchmark": "dreambench" if scenes is None else f"scenes of {scenes}",
            "scenes": len(self._scenes),
            "limit": limit,
            "digest of scenes": digest,
            **how,
        }
        compared = (
            "all photographs of a subject"
            if protocol == "all"
            else "the one photograph that is the reference"
        )
        groups = len({scene.group for scene in self._scenes})
        self.about = (
            f"{len(self._scenes)} images of {groups} subjects or combinations of them "
            f"(the groups), compared with {compared}."
        )

    def scenes(self, folder: OutputFolder) -> list[BenchmarkScene]:
        """Returns the scenes; their references are the user's files."""
        return self._scenes


def _load_scorers(
    networks: Mapping[str, str | None], batch_size: int, scenes: list[BenchmarkScene]
) -> tuple[list[scoring.Scorer], scoring.RegionScorer | None]:
    """Loads a scorer per network, and a region scorer if scenes have several subjects."""
    scorers, region_scorer, several = [], None, any(len(scene.subjects) > 1 for scene in scenes)
    for name in ("dinov2", "dino"):
        if networks[name]:
            whole, subject, patches = encoders.load_dino(name, networks[name], batch_size)
            if several and region_scorer is None:
                region_scorer = scoring.RegionScorer(patches)
            scorers.append(
                scoring.SimilarityScorer(whole, subject, region_scorer and region_scorer.name)
            )
    if networks["clip"]:
        image, text = encoders.load_clip(networks["clip"], batch_size)
        truncation.warn(text.tokenize, scene_files.texts(scenes), "clip_t")
        scorers += [
            scoring.SimilarityScorer(image, needs=region_scorer and region_scorer.name),
            scoring.PromptScorer(image, text),
        ]
    if region_scorer:
        scorers.append(scoring.MissingScorer(region_scorer.name))
    return scorers, region_scorer
