"""The batches of a generator's run, encoded once before training or in every step."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from focusdpo_jax import objectives
from focusdpo_jax.data import loader
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.training import encoding, encoding_cache, models, run_data
from focusdpo_jax.training.assembly import Assembly
from focusdpo_jax.training.sources import EncoderSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairBatches:
    """Loads and encodes the training pairs.

    Attributes:
      config: the `RunConfig`.
      model: the `models.Model`; its parameters are not read.
      assembly: the `assembly.Assembly`.
      records: the training split.
      transform: record -> a row of a PreferenceBatch.
      initial_parameters: () -> the parameters that encoding reads.
    """

    config: Any
    model: Any
    assembly: Assembly
    records: Any
    transform: Callable
    initial_parameters: Callable[[], Mapping]

    @property
    def _mesh(self):
        return self.assembly.definition.mesh

    def example(self):
        """Returns a batch of the loss as shapes with shardings."""
        config, mesh = self.config, self._mesh
        if config.data.cache and self._stored:
            row = run_data.stacked_shapes(self._stored[0], 1)
            return run_data.batch_shapes(row, config.batch_size, mesh)
        with trace_context(mesh):
            encoded = jax.eval_shape(
                self._encode_to_keep if config.data.cache else self.assembly.encode,
                self.initial_parameters(),
                run_data.stacked_shapes(
                    self.transform(self.records[0]),
                    run_data.encoding_batch_size(config, self.records, mesh),
                ),
            )
        return run_data.batch_shapes(encoded, config.batch_size, mesh)

    def open(self):
        """Returns the `loader.Batches`; first encodes the data set if that is needed."""
        records, transform = self.records, self.transform
        if self.config.data.cache:
            records, transform = self._stored or self._encode_all(), None
            if self.config.data.source == "toybox":
                records = encoding.in_memory(records)
        return run_data.open_loader(self.config, self._mesh, records, transform)

    @functools.cached_property
    def prepare(self):
        """The function from a loaded batch to a batch of the loss, on the devices."""
        if self.config.data.cache:
            return functools.partial(meshes.shard_batch, mesh=self._mesh)
        parameters = self.initial_parameters()

        def encode(batch):
            with trace_context(self._mesh):
                return self.assembly.encode(parameters, meshes.shard_batch(batch, self._mesh))

        return encode

    def encode_rows(self, parameters, batch):
        """Encodes a PreferenceBatch of any size, on the host."""
        return self._by_rows(self.assembly.encode, parameters, batch)

    def _by_rows(self, encode, parameters, batch):
        with trace_context(self._mesh):
            return encode(parameters, meshes.shard_rows(batch, self._mesh))

    @functools.cached_property
    def _encode_to_keep(self):
        return encoder_to_keep(self.config, self.assembly)

    def _encode_all(self):
        """Encodes every pair, and stores the result next to the data set if possible."""
        count, place = len(self.records), self._place
        batches = loader.evaluation_batches(
            self.records,
            transform=self.transform,
            batch_size=run_data.encoding_batch_size(self.config, self.records, self._mesh),
        )
        encode = functools.partial(self._by_rows, self._encode_to_keep)
        if place is None:
            return encoding.cached(encode, self.initial_parameters(), batches, count)
        return encoding_cache.cached(*place, self.initial_parameters, encode, batches, count)

    @functools.cached_property
    def _stored(self):
        """The stored encodings; None if they are incomplete or validation needs parameters."""
        return self._place and encoding_cache.complete(*self._place, len(self.records))

    @functools.cached_property
    def _place(self):
        """The first arguments of `encoding_cache.cached`: folder, key, parts and file digests.

        Toybox's encodings have one folder per key. None if they stay in memory, which is the case
        if Toybox's encoders are not loaded from files.
        """
        config, records, model = self.config, self.records, self.model
        source = _source_to_keep(config, self.assembly)[0]
        sizes = model.generator.config
        parts = {part: getattr(sizes, part) for part in encoding_cache.parts_read(config, source)}
        files = functools.cache(functools.partial(models.files_digest, config))
        path = epath.Path(config.data.path)
        if config.data.source == "prepared":
            key = encoding_cache.make_key(model, config, records.settings["content"], source)
            return path / encoding_cache.folder_name(config, source), key, parts, files
        digests = {part: files(part) for part in parts}
        if None in digests.values():
            return None
        key = encoding_cache.make_key(model, config, records.settings, source) | {
            "objective": config.objective,
            "spaf": config.focus.spaf,
            "dpce": config.focus.dpce,
            "chosen alone": encoding.learns_from_chosen_alone(config),
        }
        name = hashlib.sha256(json.dumps([key, digests], sort_keys=True).encode()).hexdigest()[:10]
        return path / "encoded" / f"toybox-{name}", key, parts, files


def _source_to_keep(config, assembly):
    """Returns the source of the stored similarity, and whether more is stored than the run reads.

    The stored encodings of a prepared set contain everything that any preference objective reads,
    so that runs of different objectives share them.
    """
    chosen_alone = not objectives.get(config.objective).reads_rejected
    if config.data.source == "toybox" or chosen_alone:
        return assembly.source, False
    return assembly.source or EncoderSource(assembly.generator, config.focus.prototypes), True


def encoder_to_keep(config, assembly):
    """Returns the encoder of the stored records: the run's own, or one with more outputs."""
    source, more = _source_to_keep(config, assembly)
    if not more:
        return assembly.encode
    return encoding.encoder(assembly.generator, config, source, dpce=True, quality=True)
