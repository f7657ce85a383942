"""Sample images and metrics during a run, and the table of results at its end.

Base and policy generate the same scenes from the same noise. The base's images are generated once,
when they are first needed, and stored in the run folder for resumed runs. Scenes are encoded when
they are needed, so that a run without samples and evaluation loads no encoder.
"""

import dataclasses
import functools
import io
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax import config as config_lib
from focusdpo_jax import objectives
from focusdpo_jax.data import loader
from focusdpo_jax.evaluation import toybox_results
from focusdpo_jax.files import replace_file
from focusdpo_jax.inference.generate import generate_all
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes
from focusdpo_jax.toybox import metrics as toybox_metrics
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read
from focusdpo_jax.training import encoding
from focusdpo_jax.training.writers import EVALUATION, VALIDATION
from focusdpo_jax.visualization import grids

# Scenes whose focus maps are shown for every bucket.
_EXPLAINED = 2


class Showcase:
    """Generates, evaluates and displays scenes during a run."""

    def __init__(
        self,
        config,
        workdir,
        model,
        sources,
        batches,
        *,
        mesh,
        generate,
        buckets,
        focus_maps,
        merged,
        reference,
    ):
        """Initialises it.

        All processes encode and generate together. The first process computes metrics and writes
        files.

        Args:
          config: the `RunConfig`.
          workdir: folder of the run, an `epath.Path`.
          model: the `models.Model`; its generator's parameters are not read.
          sources: {split: records}.
          batches: `PairBatches`, which also encodes the scenes.
          mesh: device mesh.
          generate: the sampler, from `make_generate`.
          buckets: {name: (structure, params)}.
          focus_maps: (structure, encoded, params, key) -> FocusMaps.
          merged: trainable parameters -> all parameters of the generator.
          reference: initial trainable parameters, or None if the run keeps none. Then the base's
            images are generated before the first step.
        """
        self._config, self._workdir = config, workdir
        self._latent_shape = model.generator.latent_shape(config.resolution)
        self._probe_parameters = model.probe
        self._mesh, self._generate = mesh, generate
        self._batches, self._merged = batches, merged
        self._buckets, self._focus_maps = buckets, focus_maps
        self._probe = jax.jit(lambda p, x: read(cast(Any, Probe(TOYBOX).apply({"params": p}, x))))
        self._sources, self._reference = sources, reference
        # The probe predicts Toybox's attributes; photographs have no ground truth.
        has_probe = config.data.source == "toybox" and model.probe is not None
        self._measures = has_probe and config.evaluation.scenes > 0
        self._shows = config.evaluation.pictures > 0
        self._validates = has_probe and config.evaluation.validation_scenes > 0

    @functools.cached_property
    def _shown(self):
        return self._scenes(self._sources["validation"], self._config.evaluation.pictures)

    @functools.cached_property
    def _measured(self):
        return self._scenes(self._sources["test"], self._config.evaluation.scenes)

    @functools.cached_property
    def _validated(self):
        return self._scenes(self._sources["validation"], self._config.evaluation.validation_scenes)

    def _scenes(self, source, count):
        """Returns up to `count` records as (batch, EncodedPairs, captions), on the host."""
        count = min(count, len(source))
        size = min(count, self._config.evaluation.batch_size)
        batches = list(
            loader.evaluation_batches(
                [source[i] for i in range(count)],
                batch_size=size,
                transform=self._batches.transform,
            )
        )
        encoded = encoding.cached(
            self._batches.encode_rows, self._batches.initial_parameters(), batches, count
        ).encoded
        raw = jax.tree.map(lambda *rows: np.concatenate(rows)[:count], *batches)
        captions = [source[i]["caption"] for i in range(count)]
        return raw, encoded, captions

    def _generate_images(self, trainable, scenes):
        """Returns uint8 images [N, H, W, 3] of encoded scenes."""
        return generate_all(
            self._generate,
            self._merged(trainable),
            scenes,
            seed=self._config.seed,
            latent_shape=self._latent_shape,
            batch_size=self._config.evaluation.batch_size,
            place=functools.partial(meshes.shard_rows, mesh=self._mesh),
        )

    def start(self, trainable):
        """Generates the base's images, if the base is not available later."""
        if self._reference is None:
            if self._shows:
                self._base_images("shown", trainable)
            if self._measures:
                self._base_images("measured", trainable)

    @functools.cached_property
    def _base(self):
        """The base's images generated so far, also by earlier starts: {name: images, name/key: str}."""
        path = self._workdir / "base.npz"
        if not (processes.is_first() and path.exists()):
            return {}
        with np.load(io.BytesIO(path.read_bytes())) as saved:
            return dict(saved)

    def _base_images(self, name, trainable=None):
        """Returns the base's images of the scenes `name`; None on processes other than the first.

        Args:
          name: "shown" or "measured".
          trainable: trainable parameters of the base, if `reference` is None.
        """
        key = self._base_key(name)
        if not processes.broadcast_from_first(str(self._base.get(f"{name}/key")) == key):
            logging.info("generating images with the base model")
            _, encoded, _ = self._shown if name == "shown" else self._measured
            images = self._generate_images(
                self._reference if trainable is None else trainable, encoded
            )
            if processes.is_first():
                self._base |= {name: images, f"{name}/key": np.array(key)}
                content = io.BytesIO()
                np.savez(content, **self._base)
                replace_file(self._workdir / "base.npz", content.getvalue())
        return self._base.get(name)

    def _base_key(self, name):
        """Returns what the base's images depend on, as JSON; a resumed run may have other fields."""
        fields, evaluation = config_lib.to_dict(self._config), self._config.evaluation
        data = {k: v for k, v in fields["data"].items() if k not in ("path", "workers", "cache")}
        count = evaluation.pictures if name == "shown" else evaluation.scenes
        kept = {k: fields[k] for k in ("model", "sampling", "seed", "resolution", "dtype")}
        return json.dumps(kept | {"data": data, "count": count}, sort_keys=True)

    def sample(self, step, trainable, writer):
        """Generates validation scenes; writes their images and the means of their metrics."""
        if self._validates:
            self._validate(step, trainable, writer)
        if self._shows:
            self._show(step, trainable, writer)

    def _validate(self, step, trainable, writer):
        """Logs the mean of every metric over validation scenes."""
        raw, encoded, _ = self._validated
        images = self._generate_images(trainable, encoded)
        if not processes.is_first():
            return
        means = {
            name: float(np.nanmean(values))
            for name, values in self._measure(images, raw).items()
            if not np.isnan(values).all()
        }
        logging.info(
            "step %d, %d validation scenes: %s",
            step,
            len(images),
            ", ".join(
                f"{name.replace('_', ' ')} {100 * mean:.1f} %" for name, mean in means.items()
            ),
        )
        writer.write_scalars(step, {f"{VALIDATION}{name}": mean for name, mean in means.items()})

    def _show(self, step, trainable, writer):
        """Writes a grid of the fixed scenes: references, pair, base, policy and focus map."""
        raw, encoded, captions = self._shown
        base, policy = self._base_images("shown"), self._generate_images(trainable, encoded)
        pairs = meshes.shard_rows(encoded, self._mesh)
        key = meshes.random_key(self._config.seed, self._mesh)
        maps = {
            name: meshes.fetch(self._focus_maps(structure, trainable, pairs, params, key))
            for name, (structure, params) in self._buckets.items()
        }
        if base is None:  # Only the first process has it.
            return
        # W of the chosen images in the bucket with the least noise.
        focus = list(maps.values())[-1].weights
        focus = focus[:: len(focus) // len(captions)]
        rows = [
            grids.PreferenceRow(
                caption=captions[i],
                references=raw.references[i][raw.present[i]],
                chosen=raw.chosen[i],
                rejected=raw.rejected[i],
                base=base[i],
                policy=policy[i],
                focus=focus[i],
            )
            for i in range(len(captions))
        ]
        image = grids.preference_grid(rows, scale=max(1, 128 // self._config.resolution))
        path = self._workdir / "samples" / f"step_{step:06d}.png"
        grids.save_png(path, image)
        logging.info("images: %s", path)
        writer.write_images(step, {"samples": image})
        if objectives.get(self._config.objective).uses_focus:
            image = self._explain(raw, maps, captions)
            grids.save_png(self._workdir / "samples" / f"focus_{step:06d}.png", image)
            writer.write_images(step, {"focus": image})

    def _explain(self, raw, maps, captions):
        """Returns an image with the focus maps of a few pairs in every bucket."""
        rows = []
        for i in range(min(_EXPLAINED, len(captions))):
            present = raw.present[i]
            for name, bucket in maps.items():
                for side, image in (("chosen", raw.chosen[i]), ("rejected", raw.rejected[i])):
                    # The two images of a pair are adjacent rows.
                    row = 2 * i + (side == "rejected")
                    focus = jax.tree.map(lambda x, row=row: x[row], bucket)
                    rows.append(
                        grids.FocusRow(
                            caption=f"{name}, {side}: {captions[i]}",
                            references=raw.references[i][present],
                            image=image,
                            similarity=()
                            if focus.similarity is None
                            else focus.similarity[present],
                            matched=focus.match and focus.match.union,
                            unmatched=focus.unmatched,
                            detail=focus.detail,
                            uncertainty=focus.uncertainty,
                            weights=focus.weights,
                        )
                    )
        return grids.focus_grid(rows)

    def finish(self, step, trainable, writer):
        """Evaluates the trained model; writes `results.json` and images, and prints the results."""
        self.sample(step, trainable, writer)
        if not self._measures:
            return
        raw, encoded, _ = self._measured
        seed = self._config.seed
        base_images = self._base_images("measured")
        policy_images = self._generate_images(trainable, encoded)
        if not processes.is_first():
            return
        policy, base = self._measure(policy_images, raw), self._measure(base_images, raw)
        results = toybox_results.summarize(base, policy, seed=seed)
        ceiling = toybox_results.summarize(self._measure(raw.chosen, raw), seed=seed)
        results["settings"] = {
            "scenes": len(encoded.prior),
            "split": "test",
            "step": step,
            "sampling": dataclasses.asdict(self._config.sampling),
            "seed": seed,
            "probe_on_renders": {k: v["base"] for k, v in ceiling["metrics"].items()},
        }
        replace_file(
            self._workdir / "results.json", json.dumps(results, indent=2, sort_keys=True) + "\n"
        )
        writer.write_scalars(
            step,
            {
                f"{EVALUATION}{name}_{side}": estimate["mean"]
                for name, sides in results["metrics"].items()
                for side, estimate in sides.items()
            },
        )
        renders = ceiling["metrics"]
        print(
            f"\nToybox, {len(encoded.prior)} test scenes with subjects never trained on; "
            "mean and 95 % interval"
        )
        print(toybox_results.format_table(results))
        print(
            "The probe's values on renders of the same scenes: "
            + ", ".join(
                f"{name.replace('_', ' ')} {100 * renders[name]['base']['mean']:.1f} %"
                for name in (
                    "fidelity",
                    "leakage",
                    "missing",
                    "class_accuracy",
                    "background_accuracy",
                )
                if name in renders
            )
        )  # Leakage is undefined if no subject is found.
        print(f"Images: {self._workdir / 'samples'}\n")

    def _measure(self, images, raw):
        """Returns {metric: values [N]} of images, from the probe's predictions."""
        size = self._config.evaluation.batch_size
        readings = [
            self._probe(self._probe_parameters, jnp.asarray(images[i : i + size]) / 255.0)
            for i in range(0, len(images), size)
        ]
        readings = jax.tree.map(lambda *rows: np.concatenate(rows), *readings)
        return toybox_metrics.compute(readings, raw.truth, raw.present)
