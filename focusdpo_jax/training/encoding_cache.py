"""Stores encoded pairs in files next to their data set.

There is one file per record. `key.json` lists everything that the files depend on: the encoders'
parameters and precision, the tokenizer, the images and their size, and the settings of SPAF's
source and of DPCE. A later run with the same key reads the files and loads no encoder. A run with
another key is refused.
"""

import dataclasses
import hashlib
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax import objectives
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import remove_unfinished, replace_file
from focusdpo_jax.models.generator import ImageView
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import processes
from focusdpo_jax.training import encoding

_FORMAT = 3  # Increased when a new version writes other files for the same encoders and images.
_NAMELESS = np.dtype("V2")


def parts_read(config, source):
    """Returns the names of the generator's parts whose parameters the encoded records depend on.

    Args:
      config: the `RunConfig`.
      source: source of SPAF's similarity (see `sources`), or None.

    Returns:
      A sorted list.
    """
    parts = {"vae", "image_encoder"} | set(source.parts if source else ())
    if encoding.text_is_frozen(config):
        parts |= {"text_encoder", "text_encoder_2"}
    return sorted(parts)


def make_key(model, config, content, source):
    """Returns the key of encoded records, without their parameters, as JSON values.

    Args:
      model: a `models.Model`; its parameters are not read.
      config: the `RunConfig`.
      content: digest of the data set, from its metadata.
      source: source of SPAF's similarity (see `sources`), or None.
    """
    return {
        "format": _FORMAT,
        "tokenizer": model.tokenizer.digest(),
        "adapter": model.generator.config.adapter.kind,
        "captions": encoding.text_is_frozen(config),
        "dtype": config.dtype,
        "pictures": content,
        "resolution": config.resolution,
        "detail": [
            config.focus.detail_bins,
            config.focus.detail_sigma,
            *(
                name
                for name in ("detail_colour", "reference_detail")
                if getattr(config.focus, name)
            ),
        ],
        "features": source and source.settings,
    }


def digest(sizes, tree):
    """Returns the SHA-256 of a part's configuration and parameters, whatever their sharding."""
    sha = hashlib.sha256(repr(sizes).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(meshes.fetch(leaf))
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def folder_name(config, source):
    """Returns the name of the folder of encoded records.

    Supervised objectives use other masks than preference objectives, and may need only the chosen
    images.
    """
    if objectives.get(config.objective).reads_rejected:
        return f"encoded_pairs_{source.settings[0]}"
    return "encoded_chosen" if encoding.learns_from_chosen_alone(config) else "encoded_both"


class StoredEncodings:
    """Encoded records in files, a random-access source for the loader."""

    def __init__(self, folder, count):
        """Initialises it with the folder and its number of records, which must all exist."""
        self._folder, self._count = folder, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        with np.load(io.BytesIO(_file(self._folder, index).read_bytes())) as saved:
            arrays = {name: _restore_type(value) for name, value in saved.items()}
        references = {
            field.name: arrays.pop(f"references.{field.name}", None)
            for field in dataclasses.fields(ImageView)
        }
        fields: dict[str, Any] = {
            field.name: arrays.get(field.name)
            for field in dataclasses.fields(encoding.EncodedPairs)
            if field.name != "references"
        }
        return encoding.EncodedPairs(references=ImageView(**references), **fields)


def cached(folder, key, parts, files, parameters, encode, batches, count):
    """Encodes the records that have no file yet, and returns all as StoredEncodings.

    No parameters are loaded if all files exist and the encoders' files have not changed. If the
    encoders' files have changed, digests of their parameters are compared, since these may still be
    equal.

    Args:
      folder: epath.Path for the files; created if missing.
      key: the key, from `make_key`.
      parts: {part: its configuration} of all parts whose parameters `encode` reads.
      files: part -> digest of its files, or None if it was not loaded from files.
      parameters: () -> {part: tree}.
      encode: from `encoding.encoder`.
      batches: iterable of PreferenceBatch over the whole data set in order; rows of index -1 are
        padding.
      count: number of records of the data set.

    Raises:
      UserError: existing files have another key, or files cannot be written.
    """
    try:
        _check(folder, key, parts, files, parameters)
        processes.barrier("key of the encoded pairs")
        ready = processes.broadcast_from_first(
            sum(_file(folder, index).exists() for index in range(count))
        )
        if ready == count:
            logging.info("using %d encoded records in %s", count, folder)
            return StoredEncodings(folder, count)
        logging.info("encoding %d of %d records to %s", count - ready, count, folder)
        if processes.is_first():
            remove_unfinished(folder)
        tree, progress = parameters(), ItemProgress("pairs encoded", count - ready)
        for batch in batches:
            rows = [
                i
                for i, index in enumerate(batch.index)
                if index >= 0 and not _file(folder, index).exists()
            ]
            if processes.broadcast_from_first(bool(rows)):
                encoded = meshes.fetch(encode(tree, batch))
                for i in rows if processes.is_first() else ():
                    row = jax.tree.map(lambda x, i=i: x[i], encoded)
                    _write(_file(folder, batch.index[i]), row)
                progress.add(len(rows))
        processes.barrier("encoded pairs")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); make room, or "
            "set config.data.cache = False"
        ) from error
    return StoredEncodings(folder, count)


def complete(folder, key, parts, files, count):
    """Returns the StoredEncodings if `cached` would load no parameters, and None otherwise.

    See `cached` for the arguments.
    """
    valid = False
    if processes.is_first() and (folder / "key.json").exists():
        old = json.loads((folder / "key.json").read_text())
        encoders = old.pop("encoders")
        valid = (
            old == key
            and _same(encoders, {part: files(part) for part in parts})
            and all(_file(folder, index).exists() for index in range(count))
        )
    if not processes.broadcast_from_first(valid):
        return None
    logging.info("using %d encoded records in %s", count, folder)
    return StoredEncodings(folder, count)


def _check(folder, key, parts, files, parameters):
    """Writes the key, or compares it with the existing one."""
    path, old, file_digests, same = folder / "key.json", None, {}, False
    if processes.is_first():
        old = json.loads(path.read_text()) if path.exists() else None
        if old is not None:
            _refuse(folder, {n: v for n, v in old.items() if n != "encoders"}, key)
        file_digests = {part: files(part) for part in parts}
        same = old is not None and _same(old["encoders"], file_digests)
    if processes.broadcast_from_first(same):
        return
    tree = parameters()
    values = {part: digest(sizes, tree[part]) for part, sizes in parts.items()}
    if processes.is_first():
        if old is not None:
            _refuse(
                folder, {n: digests["values"] for n, digests in old["encoders"].items()}, values
            )
        encoders = {part: {"files": file_digests[part], "values": values[part]} for part in parts}
        content = key | {"encoders": encoders}
        replace_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _same(encoders, file_digests):
    """Returns whether all encoders have files with the digests of the key.

    False if a part has no file, since then its parameters have to be compared.
    """
    return all(
        file_digests[part] is not None and file_digests[part] == digests["files"]
        for part, digests in encoders.items()
    )


def _refuse(folder, old, new):
    """Raises a UserError that lists the differences of two keys, if there are any."""
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"{folder} was made with other {', '.join(changed)}; remove it to encode "
            "the data set again, or set config.data.cache = False"
        )


def _file(folder, index):
    return folder / f"{index // 1000:04d}" / f"{index:07d}.npz"


def _storable(x):
    """Views bfloat16 as raw pairs of bytes, since numpy's file format has no such type."""
    return x.view(_NAMELESS) if x.dtype == jnp.bfloat16 else x


def _restore_type(x):
    """Inverse of `_storable`."""
    return x.view(jnp.bfloat16) if x.dtype == _NAMELESS else x


def _write(path, row):
    content = io.BytesIO()
    np.savez(
        content,
        **{
            jax.tree_util.keystr(path_in_row, simple=True, separator="."): _storable(leaf)
            for path_in_row, leaf in jax.tree_util.tree_leaves_with_path(row)
        },
    )
    replace_file(path, content.getvalue())
