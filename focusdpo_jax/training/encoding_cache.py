"""What the frozen encoders say of a prepared data set, kept on disk beside it.

A file a record, and `key.json`, which says what the files depend on: the encoders' parameters and
precision, the tokenizer, the pictures, their size, and the settings of SPAF's source and of DPCE.
Another run with the same key reads them instead of asking the encoders again; one with another key
is refused.
"""

import dataclasses
import hashlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax.config import SUPERVISED_OBJECTIVES
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.models.generator import ImageView
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes
from focusdpo_jax.training import encoding


def make_key(model, config, content, source):
    """What encoded records depend on, as JSON values.

    Args:
      model: a `models.Model`.
      content: digest of the data set, from its metadata.
      source: of SPAF's similarity (see `sources`), or None.
    """
    digest = hashlib.sha256()
    parts = {"vae", "image_encoder"} | set(source.parts if source else ())
    captions = encoding.text_is_frozen(config)
    if captions:
        parts |= {"text_encoder", "text_encoder_2"}
    for part in sorted(parts):
        digest.update(repr(getattr(model.generator.config, part)).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.parameters[part]):
            leaf = np.asarray(meshes.fetch(leaf))
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return {"encoders": digest.hexdigest(), "tokenizer": model.tokenizer.digest(),
            "adapter": model.generator.config.adapter.kind, "captions": captions,
            "dtype": config.dtype, "pictures": content,
            "resolution": config.resolution,
            "detail": [config.focus.detail_bins, config.focus.detail_sigma],
            "features": source and source.settings}


def folder_name(config, source):
    """Where a data set keeps its encoded records.

    A supervised objective has other masks than a preference, and may need the chosen alone.
    """
    if config.objective not in SUPERVISED_OBJECTIVES:
        return f"encoded_pairs_{source.settings[0]}"
    return "encoded_chosen" if encoding.learns_from_chosen_alone(config) else "encoded_both"


class StoredEncodings:
    """Encoded records in files; a random-access source for the loader."""

    def __init__(self, folder, count):
        """Of `count` records, all of which are there."""
        self._folder, self._count = folder, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        with np.load(io.BytesIO(_file(self._folder, index).read_bytes())) as saved:
            found = dict(saved)
        references = {field.name: found.pop(f"references.{field.name}", None)
                      for field in dataclasses.fields(ImageView)}
        return encoding.EncodedPairs(references=ImageView(**references), **{
            field.name: found.get(field.name)
            for field in dataclasses.fields(encoding.EncodedPairs) if field.name != "references"})


def cached(folder, key, encode, parameters, batches, count):
    """Encodes what is not there yet, and opens the result.

    Args:
      folder: epath.Path for the files; made if missing.
      key: of `make_key`.
      encode: from `encoding.encoder`.
      batches: iterable of PreferenceBatch over the whole data set in order; rows of index -1 are
        padding.
      count: records of the data set.

    Raises:
      UserError: the files that are there depend on something else, or cannot be written.
    """
    try:
        if processes.is_first():
            _claim(folder, key)
        processes.wait("key of the encoded pairs")
        ready = processes.from_first(
            sum(_file(folder, index).exists() for index in range(count)))
        if ready == count:
            logging.info("encoded before: %d records in %s", count, folder)
            return StoredEncodings(folder, count)
        logging.info("encoding %d of %d records to %s", count - ready, count, folder)
        for batch in batches:
            rows = [i for i, index in enumerate(batch.index)
                    if index >= 0 and not _file(folder, index).exists()]
            if processes.from_first(bool(rows)):
                encoded = encoding.as_kept(meshes.fetch(encode(parameters, batch)))
                for i in rows if processes.is_first() else ():
                    row = jax.tree.map(lambda x, i=i: x[i], encoded)
                    _write(_file(folder, batch.index[i]), row)
        processes.wait("encoded pairs")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); make room, or "
                        "set config.data.cache = False") from error
    return StoredEncodings(folder, count)


def _claim(folder, key):
    """Writes the key, or compares it with the one that is there."""
    path = folder / "key.json"
    if not path.exists():
        replace_file(path, json.dumps(key, indent=2, sort_keys=True) + "\n")
        return
    old = json.loads(path.read_text())
    changed = sorted(name for name in old.keys() | key.keys() if old.get(name) != key.get(name))
    if changed:
        raise UserError(f"{folder} was made with other {', '.join(changed)}; remove it to encode "
                        "the data set again, or set config.data.cache = False")


def _file(folder, index):
    return folder / f"{index // 1000:04d}" / f"{index:07d}.npz"


def _plain(x):
    """bfloat16, which numpy's files cannot name, as float32; all else as it is."""
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def _write(path, row):
    content = io.BytesIO()
    np.savez(content, **{jax.tree_util.keystr(where, simple=True, separator="."): _plain(leaf)
                         for where, leaf in jax.tree_util.tree_leaves_with_path(row)})
    replace_file(path, content.getvalue())
