"""What a run shows of itself: pictures on the way, and a table with pictures at the end.

Base and policy draw the same scenes from the same noise. The base's pictures are made once, when
they are first shown or measured, and kept in the run folder, so that a resumed run does not make
them again. Scenes are encoded when they are needed: a run that shows nothing needs no encoder.
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

# Scenes on the page that shows how their weights come about, bucket by bucket.
_EXPLAINED = 2


class Showcase:
    """Draws, measures and shows scenes during a run."""

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
        """Initialises it. All processes encode and draw together; the first one measures and writes.

        Args:
          config: of the run.
          workdir: an `epath.Path`.
          model: the `models.Model`; its generator's parameters are not read.
          sources: {split: records}.
          batches: `PairBatches`, which encodes scenes as it does pairs.
          generate: of `make_generate`.
          buckets: {name: (structure, params)}.
          focus_maps: (structure, encoded, params, key) -> FocusMaps.
          merged: trainable parameters -> all parameters of the generator.
          reference: initial trainable parameters; None where a run keeps none, so that the base draws
            before the first step.
        """
        self._config, self._workdir = config, workdir
        self._latent_shape = model.generator.latent_shape(config.resolution)
        self._probe_parameters = model.probe
        self._mesh, self._generate = mesh, generate
        self._batches, self._merged = batches, merged
        self._buckets, self._focus_maps = buckets, focus_maps
        self._probe = jax.jit(lambda p, x: read(cast(Any, Probe(TOYBOX).apply({"params": p}, x))))
        self._sources, self._reference = sources, reference
        # The probe reads Toybox's attributes; photographs have no ground truth.
        known = config.data.source == "toybox" and model.probe is not None
        self._measures = known and config.evaluation.scenes > 0
        self._shows = config.evaluation.pictures > 0
        self._validates = known and config.evaluation.validation_scenes > 0

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
        """The first `count` records or all, as loaded and as encoded, on the host."""
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

    def _draw(self, trainable, scenes):
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
        """Draws with the base now, if it is gone later."""
        if self._reference is None:
            if self._shows:
                self._by_base("shown", trainable)
            if self._measures:
                self._by_base("measured", trainable)

    @functools.cached_property
    def _base(self):
        """What the base drew before, in this start of the run or in another."""
        path = self._workdir / "base.npz"
        if not (processes.is_first() and path.exists()):
            return {}
        with np.load(io.BytesIO(path.read_bytes())) as saved:
            return dict(saved)

    def _by_base(self, name, trainable=None):
        """What the base draws of the scenes "shown" or "measured"; on the first process."""
        if not processes.broadcast_from_first(name in self._base):
            logging.info("drawing with the base model")
            _, encoded, _ = self._shown if name == "shown" else self._measured
            drawn = self._draw(self._reference if trainable is None else trainable, encoded)
            if processes.is_first():
                self._base[name] = drawn
                content = io.BytesIO()
                np.savez(content, **self._base)
                replace_file(self._workdir / "base.npz", content.getvalue())
        return self._base.get(name)

    def sample(self, step, trainable, writer):
        """Draws and measures validation scenes."""
        if self._validates:
            self._validate(step, trainable, writer)
        if self._shows:
            self._show(step, trainable, writer)

    def _validate(self, step, trainable, writer):
        """Logs the mean of every measure over validation scenes."""
        raw, encoded, _ = self._validated
        drawn = self._draw(trainable, encoded)
        if not processes.is_first():
            return
        means = {
            name: float(np.nanmean(values))
            for name, values in self._measure(drawn, raw).items()
            if not np.isnan(values).all()
        }
        logging.info(
            "step %d, %d validation scenes: %s",
            step,
            len(drawn),
            ", ".join(
                f"{name.replace('_', ' ')} {100 * mean:.1f} %" for name, mean in means.items()
            ),
        )
        writer.write_scalars(step, {f"{VALIDATION}{name}": mean for name, mean in means.items()})

    def _show(self, step, trainable, writer):
        """A grid of pictures of the fixed scenes: references, pair, base, policy, focus map."""
        raw, encoded, captions = self._shown
        base, drawn = self._by_base("shown"), self._draw(trainable, encoded)
        pairs = meshes.shard_rows(encoded, self._mesh)
        key = meshes.random_key(self._config.seed, self._mesh)
        maps = {
            name: meshes.fetch(self._focus_maps(structure, pairs, params, key))
            for name, (structure, params) in self._buckets.items()
        }
        if base is None:  # Only the first process has it.
            return
        # W of the chosen pictures in the cleanest bucket.
        focus = list(maps.values())[-1].weights
        focus = focus[:: len(focus) // len(captions)]
        rows = [
            grids.PreferenceRow(
                caption=captions[i],
                references=raw.references[i][raw.present[i]],
                chosen=raw.chosen[i],
                rejected=raw.rejected[i],
                base=base[i],
                policy=drawn[i],
                focus=focus[i],
            )
            for i in range(len(captions))
        ]
        image = grids.preference_grid(rows, scale=max(1, 128 // self._config.resolution))
        path = self._workdir / "samples" / f"step_{step:06d}.png"
        grids.save_png(path, image)
        logging.info("pictures: %s", path)
        writer.write_images(step, {"samples": image})
        if objectives.get(self._config.objective).uses_focus:
            image = self._explain(raw, maps, captions)
            grids.save_png(self._workdir / "samples" / f"focus_{step:06d}.png", image)
            writer.write_images(step, {"focus": image})

    def _explain(self, raw, maps, captions):
        """A page of how the weights of a few pairs come about in every bucket."""
        rows = []
        for i in range(min(_EXPLAINED, len(captions))):
            present = raw.present[i]
            for name, bucket in maps.items():
                for side, image in (("chosen", raw.chosen[i]), ("rejected", raw.rejected[i])):
                    # The two of a pair lie side by side.
                    seen = jax.tree.map(lambda x, k=2 * i + (side == "rejected"): x[k], bucket)
                    rows.append(
                        grids.FocusRow(
                            caption=f"{name}, {side}: {captions[i]}",
                            references=raw.references[i][present],
                            image=image,
                            similarity=() if seen.similarity is None else seen.similarity[present],
                            matched=seen.match and seen.match.union,
                            unmatched=seen.unmatched,
                            detail=seen.detail,
                            uncertainty=seen.uncertainty,
                            weights=seen.weights,
                        )
                    )
        return grids.focus_grid(rows)

    def finish(self, step, trainable, writer):
        """Draws and measures with the trained model; leaves `results.json` and pictures."""
        self.sample(step, trainable, writer)
        if not self._measures:
            return
        raw, encoded, _ = self._measured
        seed = self._config.seed
        base, drawn = self._by_base("measured"), self._draw(trainable, encoded)
        if not processes.is_first():
            return
        policy, base = self._measure(drawn, raw), self._measure(base, raw)
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
            "The probe that reads the pictures, on renders of the same scenes: "
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
        )  # Where no subject is found, leakage is not defined.
        print(f"Pictures: {self._workdir / 'samples'}\n")

    def _measure(self, images, raw):
        size = self._config.evaluation.batch_size
        readings = [
            self._probe(self._probe_parameters, jnp.asarray(images[i : i + size]) / 255.0)
            for i in range(0, len(images), size)
        ]
        readings = jax.tree.map(lambda *rows: np.concatenate(rows), *readings)
        return toybox_metrics.compute(readings, raw.truth, raw.present)
