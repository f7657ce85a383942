"""Encoded records on disk equal the encoders' outputs, also after an interruption, and are never stale."""

import dataclasses
import hashlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from focusdpo_jax import config as config_lib
from focusdpo_jax.data.record import PreferenceBatch
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.generator import ImageView
from focusdpo_jax.training import encoding, encoding_cache, models

COUNT, SIZE = 5, 2
KEY = {"pictures": "b", "resolution": 8, "detail": [16, 3.0]}
PARAMETERS = {"vae": {"shift": np.float32(0.1)}}


def batches():
    """Five records in batches of two; the last row is padding."""
    for start in range(0, COUNT, SIZE):
        index = np.arange(start, start + SIZE)
        empty = dict.fromkeys(PreferenceBatch.__dataclass_fields__)
        yield PreferenceBatch(**empty | {"index": np.where(index < COUNT, index, -1)})


def encode(parameters, batch):
    """An encoder whose outputs identify their record."""
    value = np.float32(batch.index)[:, None, None, None] + parameters["vae"]["shift"]
    fields = dict.fromkeys(encoding.EncodedPairs.__dataclass_fields__)
    return encoding.EncodedPairs(
        **fields
        | {
            "latents_mean": np.broadcast_to(value, (SIZE, 2, 4, 4)),
            "references": ImageView(np.zeros((SIZE, 1, 3), np.float32)),
            "prior": np.ones((SIZE, 4, 4), np.float32),
            "time_ids": np.tile(np.float32([1000.5, 2, 3]), (SIZE, 1)),
            "index": batch.index,
        }
    )


def cached(folder, key=KEY, encode=encode, parameters=lambda: PARAMETERS, files="files", sizes=1):
    return encoding_cache.cached(
        epath.Path(folder),
        key,
        {"vae": sizes},
        lambda part: files,
        parameters,
        encode,
        batches(),
        COUNT,
    )


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_files_equal_the_cache_in_memory(tmp_path):
    stored, kept = cached(tmp_path / "e"), encoding.cached(encode, PARAMETERS, batches(), COUNT)
    assert len(stored) == len(kept) == COUNT
    for i in range(COUNT):
        # To the bit: 0.1 is no number of half precision.
        assert stored[i].latents_mean[0, 0, 0] == np.float32(i) + np.float32(0.1)
        assert stored[i].latents_mean.dtype == np.float32 and stored[i].detail is None
        jax.tree.map(np.testing.assert_array_equal, stored[i], kept[i])


def test_bfloat16_is_kept_to_the_bit(tmp_path):
    def precise(parameters, batch):
        encoded = encode(parameters, batch)
        return encoded.replace(references=ImageView(jnp.full((SIZE, 3), 1 / 3, jnp.bfloat16)))

    stored = cached(tmp_path / "e", encode=precise)[3].references.features
    assert stored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored, jnp.bfloat16(1 / 3))


def test_second_time_needs_no_encoder(tmp_path):
    cached(tmp_path / "e")
    before = tree(tmp_path)
    # No encoder's parameters are there to be asked for.
    stored = cached(tmp_path / "e", encode=None, parameters=None)
    assert stored[4].latents_mean[0, 0, 0] == np.float32(4.1) and tree(tmp_path) == before


@pytest.mark.parametrize("before, after", [("files", "other"), (None, None), (None, "files")])
def test_other_files_may_contain_the_same_encoders(before, after, tmp_path):
    cached(tmp_path / "e", files=before)
    asked = []

    def parameters():
        asked.append(1)
        return PARAMETERS

    cached(tmp_path / "e", encode=None, parameters=parameters, files=after)
    assert len(asked) == 1
    # They are remembered, where they are files.
    cached(tmp_path / "e", encode=None, parameters=parameters, files=after)
    assert len(asked) == (1 if after else 2)


@pytest.mark.parametrize(
    "changes", [{"parameters": lambda: {"vae": {"shift": np.float32(0.2)}}}, {"sizes": 2}]
)
def test_other_encoders_are_refused(changes, tmp_path):
    cached(tmp_path / "e")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="was made with other vae; remove it"):
        cached(tmp_path / "e", **{"files": "other"} | changes)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_and_repeated_is_the_same_to_the_byte(at, tmp_path):
    cached(tmp_path / "whole")
    asked = []

    def some(parameters, batch):
        if len(asked) == at:
            raise KeyboardInterrupt
        asked.append(batch)
        return encode(parameters, batch)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "parts", encode=some)
    # What a writer that was killed leaves.
    (tmp_path / "parts" / "0000").mkdir(exist_ok=True)
    (tmp_path / "parts" / "0000" / "0000004.npz.0123abcd.tmp").write_bytes(b"half")
    again = []
    cached(tmp_path / "parts", encode=lambda p, b: again.append(b) or encode(p, b))
    assert len(again) == 3 - at
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", ["resolution", "detail", "pictures"])
def test_stale_files_are_refused(name, tmp_path):
    cached(tmp_path / "e")
    with pytest.raises(UserError, match=f"was made with other {name}; remove it"):
        cached(tmp_path / "e", KEY | {name: "other"})


def test_runs_that_need_other_images_or_masks_have_separate_folders():
    def folder(objective, share, features="vit"):
        config = config_lib.RunConfig(objective=objective, rejected_share=share)
        return encoding_cache.folder_name(config, mock.Mock(settings=[features]))

    assert folder("dpo", 0.0) == folder("focus_dpo", 0.0) == "encoded_pairs_vit"
    assert folder("focus_dpo", 0.0, "unet") == "encoded_pairs_unet"
    assert folder("sft", 0.0) == "encoded_chosen"
    assert folder("sft", 0.5) == "encoded_both"


def test_key_depends_on_data_tokenizer_source_and_settings():
    config = config_lib.RunConfig(dtype="float32", resolution=8)
    generator = mock.Mock(**{"config.adapter.kind": "resampler"})

    def key(content="x", source=None, words="t", **changes):
        model = models.Model(generator, {}, mock.Mock(digest=lambda: words), None)
        changed = dataclasses.replace(config, **changes)
        return encoding_cache.make_key(model, changed, content, source)

    unet = mock.Mock(parts=("unet",), settings=["unet", 16, 124, 374])
    others = [
        key("y"),
        key(words="u"),
        key(source=unet),
        key(dtype="bfloat16"),
        key(resolution=16),
        key(trainable="generator"),
    ]
    assert all(other != key() for other in others)
    assert key(source=unet)["features"] == ["unet", 16, 124, 374]
    # Text encoders matter unless they are trained: then the captions are not kept.
    everything = ["image_encoder", "text_encoder", "text_encoder_2", "unet", "vae"]
    assert encoding_cache.parts_read(config, unet) == everything
    config = dataclasses.replace(config, trainable="generator")
    assert encoding_cache.parts_read(config, None) == ["image_encoder", "vae"]


@pytest.mark.parametrize(
    "objective, share, name",
    [
        ("sft", 0.0, "encoded_chosen"),
        ("sft", 0.1, "encoded_both"),
        ("focus_dpo", 0.0, "encoded_pairs_attention"),
    ],
)
def test_each_kind_of_records_has_its_folder(objective, share, name):
    config = config_lib.RunConfig(objective=objective, rejected_share=share)
    assert encoding_cache.folder_name(config, mock.Mock(settings=["attention"])) == name
