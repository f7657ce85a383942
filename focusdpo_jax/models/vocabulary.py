"""Files of CLIP's tokenizer as transformers writes them: vocabulary, merges and special tokens.

vocab.json, merges.txt      written by transformers up to 4; published with SDXL and CLIP
tokenizer.json              all in one file; transformers 5 writes it alone
tokenizer_config.json, special_tokens_map.json, added_tokens.json
                            special tokens; optional
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import read_json, replace_file

NEEDED = "vocab.json and merges.txt, or tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"
PAD_TOKENS = (END, "!")
"""The pad tokens of SDXL's first and second text encoder."""

_PAIR = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"
# The regular expression that splits a text into words, without CLIP's special tokens.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def missing(folder: epath.Path) -> list[str]:
    """Returns the paths of the required files that are not in a folder."""
    lacks = [str(folder / name) for name in _PAIR if not (folder / name).exists()]
    return [] if (folder / _WHOLE).exists() else lacks


def read(folder: epath.Path) -> dict[str, bytes]:
    """Reads the vocabulary of a folder; vocab.json and merges.txt take precedence.

    Returns:
      {"vocab.json": bytes, "merges.txt": bytes}.

    Raises:
      UserError: files are missing or damaged, or not those of a CLIP tokenizer.
    """
    lacks = missing(folder)
    if lacks:
        raise UserError(
            f"{' and '.join(lacks)} {'are' if len(lacks) > 1 else 'is'} missing; a folder of "
            f"CLIP's tokenizer has {NEEDED}."
        )
    if all((folder / name).exists() for name in _PAIR):
        vocabulary = read_json(folder / "vocab.json")
        files = {name: (folder / name).read_bytes() for name in _PAIR}
    else:
        vocabulary, files = _read_whole(folder / _WHOLE)
    path = folder / (_PAIR[0] if (folder / _PAIR[0]).exists() else _WHOLE)
    absent = [token for token in (START, END) if token not in vocabulary]
    if absent:
        raise UserError(
            f"{path} has no {' and no '.join(absent)}: it is not the vocabulary of CLIP."
        )
    settings = _settings(folder)
    for name, token in (("bos_token", START), ("eos_token", END)):
        if settings.get(name, token) != token:
            raise UserError(
                f"{folder}: {name} = {settings[name]!r}: only CLIP's {token!r} is supported."
            )
    _refuse_added(folder, settings, vocabulary)
    return files


def _read_whole(path: epath.Path) -> tuple[dict[str, int], dict[str, bytes]]:
    """Returns the vocabulary of a tokenizer.json, and the result of `read`."""
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path} is not a CLIP tokenizer: it has no model.")
    if wrong := _difference(values):
        raise UserError(f"{path} is not a CLIP tokenizer: {wrong}.")
    try:
        vocabulary = model["vocab"]
        # Newer files have a list of two, older ones a text with a space between the two.
        merges = [
            merge if isinstance(merge, str) else "{} {}".format(*merge) for merge in model["merges"]
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is damaged: its model has no vocabulary and merges ({error})."
        ) from error
    known = {START, END, "!"}
    added = [
        token
        for token in _contents(values.get("added_tokens"))
        if token not in vocabulary or token not in known
    ]
    _refuse(path, added)
    text = json.dumps(vocabulary, ensure_ascii=False)
    return vocabulary, {
        "vocab.json": text.encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


def _difference(values: Mapping[str, Any]) -> str | None:
    """Describes how tokenization by a tokenizer.json differs from CLIP's; None if it does not."""
    model, parts = values["model"], _flat(values.get("pre_tokenizer"), "pretokenizers")
    if model.get("type", "BPE") != "BPE":
        return f"its model is {model['type']!r} and not 'BPE'"
    if model.get("end_of_word_suffix") != "</w>":
        return f"end_of_word_suffix = {model.get('end_of_word_suffix')!r} (not '</w>')"
    kinds = {part.get("type") for part in _flat(values.get("normalizer"), "normalizers")}
    if kinds != {"NFC", "Replace", "Lowercase"}:
        return f"its normalizer is {sorted(map(str, kinds))} (not NFC, Replace, Lowercase)"
    pattern = next((part.get("pattern") for part in parts if part.get("type") == "Split"), None)
    words = pattern.get("Regex", "") if isinstance(pattern, dict) else ""
    words = words.removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"] or words != _WORDS:
        return "its pre_tokenizer is not CLIP's"
    return None


def _flat(stage: Any, name: str) -> list[dict[str, Any]]:
    """Returns the steps of a stage of a tokenizer.json, a sequence or a single step."""
    if not isinstance(stage, dict):
        return []
    return stage.get(name) or [] if stage.get("type") == "Sequence" else [stage]


def _settings(folder: epath.Path) -> dict[str, Any]:
    """Returns the fields of the files of special tokens; tokens are given by their text."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found |= {
                field: value["content"] if isinstance(value, dict) and "content" in value else value
                for field, value in read_json(folder / name).items()
            }
    return found


def _contents(tokens: Iterable[Any] | None) -> list[Any]:
    """Returns the texts of a list of added tokens."""
    return [token.get("content") if isinstance(token, dict) else token for token in tokens or ()]


def _refuse_added(
    folder: epath.Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> None:
    """Raises a UserError if transformers would add tokens to the vocabulary."""
    decoder = settings.get("added_tokens_decoder")
    added = _contents(decoder.values()) if isinstance(decoder, dict) else []
    added += _contents(settings.get("additional_special_tokens"))
    if (folder / "added_tokens.json").exists():
        added += read_json(folder / "added_tokens.json")
    _refuse(folder, [token for token in added if token not in vocabulary])


def _refuse(path: epath.Path, added: Sequence[str]) -> None:
    if added:
        raise UserError(
            f"{path} adds tokens to CLIP's, such as {added[0]!r}: textual inversions and other "
            "additions are not supported; give a tokenizer without them."
        )


def pad_tokens(folder: epath.Path) -> tuple[str, ...]:
    """Reads the pad tokens of a pipeline or model; those that it does not state are SDXL's.

    Args:
      folder: folder of the pipeline, with tokenizer/ and perhaps tokenizer_2/.

    Returns:
      The pad token of each of the two text encoders.
    """
    return tuple(
        _settings(folder / name).get("pad_token") or pad_token
        for name, pad_token in zip(("tokenizer", "tokenizer_2"), PAD_TOKENS)
    )


def save_pad_tokens(folder: epath.Path, tokens: Sequence[str]) -> None:
    """Writes pad tokens for `pad_tokens` to read; nothing if they are SDXL's.

    Args:
      folder: folder of the pipeline or model.
      tokens: the pad token of each text encoder.
    """
    if tuple(tokens) == PAD_TOKENS:
        return
    for name, token in zip(("tokenizer", "tokenizer_2"), tokens):
        replace_file(folder / name / "tokenizer_config.json", json.dumps({"pad_token": token}))
