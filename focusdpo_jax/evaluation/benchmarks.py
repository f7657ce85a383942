"""The benchmarks: which scenes each asks for, and who scores them.

A benchmark has `settings`, all that its scenes depend on; `about`, a sentence for people;
`scorers` and `region_scorer` (or None), as `scoring` describes them; and `scenes`, which takes the
output folder. What is wrong with it is found when it is made, before anything is drawn.
"""

import dataclasses
import hashlib
import json

from focusdpo_jax.data import dataset
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import dreambench, scoring, toybox_scenes
from focusdpo_jax.evaluation import scenes as scene_files
from focusdpo_jax.models import truncation
from focusdpo_jax.vision import encoders


class ToyboxBenchmark:
    """Test scenes of the procedural world, whose truth is known."""

    region_scorer = None

    def __init__(self, config, probe, *, samples, seed, limit, batch_size):
        """Takes the world and the number of scenes from a run's configuration.

        Args:
          config: RunConfig; it reads `data`, `resolution` and `evaluation`.
          probe: parameters of the probe network, or None.
          samples: images of each scene.
          seed: of the noise.
          limit: the first so many images alone, or None.
          batch_size: images scored at once.

        Raises:
          UserError: the configuration is not about Toybox, or has no scenes, or there is no probe.
        """
        if config.data.source != "toybox":
            raise UserError(
                f"config.data.source = {config.data.source!r}: of people's own "
                "images the truth is not known; give --dreambench or --scenes."
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
        self.scorers = [
            toybox_scenes.ToyboxScorer(probe, self._source, self._world.max_subjects, batch_size)
        ]
        self.settings = {
            "benchmark": "toybox",
            "world": dataclasses.asdict(self._world),
            "scenes": self._count,
            "samples": samples,
            "seed": seed,
            "limit": limit,
        }
        self.about = (
            f"Toybox: {self._count} test scenes with subjects never trained on, read "
            "by the probe network; a group is a scene."
        )

    def scenes(self, folder):
        """A list of BenchmarkScene; writes their references to `folder`."""
        return toybox_scenes.write_scenes(
            self._source,
            self._count,
            folder.path / "references",
            samples=self._samples,
            seed=self._seed,
        )[: self._limit]


class PhotographBenchmark:
    """DreamBench's subjects, one or several in a scene, compared with their photographs."""

    def __init__(self, folder, scenes, *, protocol, samples, seed, limit, networks, batch_size):
        """Reads what the benchmark asks for.

        Args:
          folder: DreamBench's dataset folder; may be None where `scenes` is given.
          scenes: JSON file in UNO's layout, or None for every subject with every prompt.
          protocol, samples, seed: see `dreambench.single`.
          limit: the first so many images alone, or None.
          networks: {"dino", "dinov2", "clip": folder or None}; at least one.
          batch_size: images scored at once.

        Raises:
          UserError: the benchmark cannot be read, or there is no network to measure with.
        """
        if not any(networks.values()):
            raise UserError(
                "give --dinov2, --dino or --clip, the folder of a network to measure "
                "with; docs/evaluation.md says where they come from."
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
        self.settings = {
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

    def scenes(self, folder):
        """A list of BenchmarkScene; their references are the user's files."""
        return self._scenes


def _load_scorers(networks, batch_size, scenes):
    """One a network; and where scenes have several subjects one that finds them, or None."""
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
