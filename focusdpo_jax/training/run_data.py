"""The data of a run: its splits, the number of subject slots, and the loader of this process."""

import itertools

import jax
import numpy as np
from absl import logging

from focusdpo_jax import config as config_lib
from focusdpo_jax.data import dataset, loader
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import truncation
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes
from focusdpo_jax.training import encoding


def open_data(config):
    """Opens the data set of `config.data.source`; Toybox is built unless it exists.

    Returns:
      {split: source}: "train", "validation" and, for Toybox or if `prepare` wrote one, "test".

    Raises:
      UserError: there is no prepared data set, or it does not fit the configuration.
    """
    if config.data.source == "prepared":
        return _open_prepared(config)
    sizes = {
        "train": config.data.train_size,
        "validation": config.data.validation_size,
        "test": config.data.test_size,
    }
    # Process 0 builds first; on a shared disk the others find the finished data set.
    if not processes.is_first():
        processes.barrier("data")
    path = dataset.build_toybox(config.data.path, dataset.toybox_world(config), sizes)
    if processes.is_first():
        processes.barrier("data")
    return {split: dataset.open_source(path, split) for split in sizes}


def _open_prepared(config):
    sources = dataset.open_prepared(config.data.path)
    side, count = sources["train"].settings["resolution"], len(sources["train"])
    if side != config.resolution:
        raise UserError(
            f"config.resolution = {config.resolution}: the images of "
            f"{config.data.path} have {side}; give that, or prepare them again"
        )
    config_lib.require_pairs(
        config,
        config.data.path,
        count,
        meshes.num_batch_shards(meshes.make_mesh(config.mesh.sizes, config.batch_size)),
    )
    if "validation" not in sources:
        logging.info(
            "%s has no validation split; sample images use training pairs", config.data.path
        )
    return {"validation": sources["train"]} | sources


def subject_slots(config, sources):
    """Returns the number of subject slots of a batch: the most subjects of a record."""
    if config.data.source == "prepared":
        return sources["train"].settings["subjects"]
    return len(config.data.subject_counts)


def warn_of_long_captions(config, model, sources):
    """Logs one warning about captions of a prepared set that the text encoders would truncate.

    Toybox's captions always fit, since its tokenizer was built from them.
    """
    if config.data.source == "prepared" and processes.is_first():
        # Two splits may be the same source.
        unique = {id(source): source for source in sources.values()}
        texts = [source.texts() for source in unique.values()]
        checked, count = sum(map(len, texts)), sum(map(len, unique.values()))
        among = "" if checked == count else f", the first {checked} of {count} pairs"
        truncation.warn(
            model.tokenizer,
            itertools.chain(*texts),
            f"config.data.path = {config.data.path!r}{among}",
        )


def encoding_batch_size(config, records, mesh):
    """Returns the number of pairs that are encoded at once, a multiple of the batch shards."""
    shares = meshes.num_batch_shards(mesh)
    size = min(len(records), config.evaluation.batch_size)
    return -(-size // shares) * shares


def open_loader(config, mesh, records, transform):
    """Returns the `loader.Batches` of this process; `config.seed` determines the order."""
    order = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rows": meshes.process_rows(mesh, config.batch_size),
    }
    if isinstance(records, encoding.EncodedSource):
        # In memory, a batch is indexed in one call, which needs no thread.
        return loader.make_loader(
            range(len(records)), batch_transform=records.__getitem__, threads=0, **order
        )
    return loader.make_loader(records, transform=transform, workers=config.data.workers, **order)


def stacked_shapes(row, count):
    """Returns the shapes of `count` stacked examples like `row`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (count, *np.shape(x)), jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
        ),
        row,
    )


def batch_shapes(tree, count, mesh):
    """Returns the shapes of a batch of `count` examples, sharded as by `meshes.shard_batch`."""
    examples = meshes.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=examples), tree
    )
