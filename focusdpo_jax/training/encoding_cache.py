"""Encoded pairs on disk, beside their data set.

One file a record, and `key.json` with everything that the files depend on: the encoders' parameters and
precision, the tokenizer, the images, their size, and the settings of SPAF's source and of DPCE. A later run
with the same key reads the files, so that it loads no encoder; a run with another key is refused.
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

_FORMAT = 3  # Increased when the same encoders and images give other files.
_NAMELESS = np.dtype("V2")


def parts_read(config, source):
    """Returns the sorted parts of the generator whose parameters the encoded records depend on.

    Args:
      source: of SPAF's similarity (see `sources`), or None.
    """
    parts = {"vae", "image_encoder"} | set(source.parts if source else ())
    if encoding.text_is_frozen(config):
        parts |= {"text_encoder", "text_encoder_2"}
    return sorted(parts)


def make_key(model, config, content, source):
    """Returns what encoded records depend on besides parameters, as JSON values.

    Args:
      model: a `models.Model`; its parameters are not read.
      content: digest of the data set, from its metadata.
      source: of SPAF's similarity (see `sources`), or None.
    """
    return {
        "format": _FORMAT,
        "tokenizer": model.tokenizer.digest(),
        "adapter": model.generator.config.adapter.kind,
        "captions": encoding.text_is_frozen(config),
        "dtype": config.dtype,
        "pictures": content,
        "resolution": config.resolution,
        "detail": [config.focus.detail_bins, config.focus.detail_sigma],
        "features": source and source.settings,
    }


def digest(sizes, tree):
    """Returns the SHA-256 of a part's configuration and parameters, on any devices."""
    found = hashlib.sha256(repr(sizes).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(meshes.fetch(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def folder_name(config, source):
    """Returns the name of the folder of encoded records.

    Supervised objectives use other masks than preferences, and may need the chosen images alone.
    """
    if objectives.get(config.objective).reads_rejected:
        return f"encoded_pairs_{source.settings[0]}"
    return "encoded_chosen" if encoding.learns_from_chosen_alone(config) else "encoded_both"


class StoredEncodings:
    """Encoded records in files, a random-access source for the loader."""

    def __init__(self, folder, count):
        """Takes the folder and its number of records, all of which exist."""
        self._folder, self._count = folder, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        with np.load(io.BytesIO(_file(self._folder, index).read_bytes())) as saved:
            found = {name: _named(value) for name, value in saved.items()}
        references = {
            field.name: found.pop(f"references.{field.name}", None)
            for field in dataclasses.fields(ImageView)
        }
        fields: dict[str, Any] = {
            field.name: found.get(field.name)
            for field in dataclasses.fields(encoding.EncodedPairs)
            if field.name != "references"
        }
        return encoding.EncodedPairs(references=ImageView(**references), **fields)


def cached(folder, key, parts, files, parameters, encode, batches, count):
    """Encodes the records that have no file yet, and returns all as StoredEncodings.

    If all exist and the encoders' files have not changed, no parameter is loaded. If the encoders' files have
    changed, their parameters are compared, which may still be equal.

    Args:
      folder: epath.Path for the files; created if missing.
      key: of `make_key`.
      parts: {part: its configuration} of all whose parameters `encode` reads.
      files: part -> digest of the files that it is read from, or None if it is in no file.
      parameters: () -> {part: tree}.
      encode: from `encoding.encoder`.
      batches: iterable of PreferenceBatch over the whole data set in order; rows of index -1 are
        padding.
      count: records of the data set.

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
            logging.info("encoded before: %d records in %s", count, folder)
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
    """Returns the StoredEncodings if `cached` would load no parameter; None otherwise."""
    found = False
    if processes.is_first() and (folder / "key.json").exists():
        old = json.loads((folder / "key.json").read_text())
        encoders = old.pop("encoders")
        found = (
            old == key
            and _same(encoders, {part: files(part) for part in parts})
            and all(_file(folder, index).exists() for index in range(count))
        )
    if not processes.broadcast_from_first(found):
        return None
    logging.info("encoded before: %d records in %s", count, folder)
    return StoredEncodings(folder, count)


def _check(folder, key, parts, files, parameters):
    """Writes the key, or compares it with the existing one."""
    path, old, found, same = folder / "key.json", None, {}, False
    if processes.is_first():
        old = json.loads(path.read_text()) if path.exists() else None
        if old is not None:
            _refuse(folder, {n: v for n, v in old.items() if n != "encoders"}, key)
        found = {part: files(part) for part in parts}
        same = old is not None and _same(old["encoders"], found)
    if processes.broadcast_from_first(same):
        return
    tree = parameters()
    values = {part: digest(sizes, tree[part]) for part, sizes in parts.items()}
    if processes.is_first():
        if old is not None:
            _refuse(
                folder, {n: digests["values"] for n, digests in old["encoders"].items()}, values
            )
        encoders = {part: {"files": found[part], "values": values[part]} for part in parts}
        content = key | {"encoders": encoders}
        replace_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _same(encoders, found):
    """Whether the encoders' files are those of the key; a part without a file has to be compared itself."""
    return all(
        found[part] is not None and found[part] == digests["files"]
        for part, digests in encoders.items()
    )


def _refuse(folder, old, new):
    """Raises a UserError that names what differs, if anything does."""
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"{folder} was made with other {', '.join(changed)}; remove it to encode "
            "the data set again, or set config.data.cache = False"
        )


def _file(folder, index):
    return folder / f"{index // 1000:04d}" / f"{index:07d}.npz"


def _plain(x):
    """bfloat16 as two bytes without a name, since numpy's files have no such type."""
    return x.view(_NAMELESS) if x.dtype == jnp.bfloat16 else x


def _named(x):
    return x.view(jnp.bfloat16) if x.dtype == _NAMELESS else x


def _write(path, row):
    content = io.BytesIO()
    np.savez(
        content,
        **{
            jax.tree_util.keystr(where, simple=True, separator="."): _plain(leaf)
            for where, leaf in jax.tree_util.tree_leaves_with_path(row)
        },
    )
    replace_file(path, content.getvalue())
