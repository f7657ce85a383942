"""The files of CLIP's tokenizer: vocabulary, merges and special tokens, as transformers writes them.

vocab.json, merges.txt      of transformers up to 4, and what is published with SDXL and CLIP
tokenizer.json              all in one; the only one that transformers 5 writes
tokenizer_config.json, special_tokens_map.json, added_tokens.json
                            special tokens; a folder need not have them
"""

import json

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import read_json, replace_file

NEEDED = "vocab.json and merges.txt, or tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"
FILLERS = (END, "!")
"""What fills up short captions of SDXL's first and second text encoder."""

_PAIR = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"
# How CLIP parts a text into words, without its special tokens.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def missing(folder):
    """Paths of the files that a folder, an `epath.Path`, lacks."""
    lacks = [str(folder / name) for name in _PAIR if not (folder / name).exists()]
    return [] if (folder / _WHOLE).exists() else lacks


def read(folder):
    """The vocabulary of a folder, in two files.

    Args:
      folder: an `epath.Path`. vocab.json and merges.txt count where it has both.

    Returns:
      {"vocab.json": bytes, "merges.txt": bytes}.

    Raises:
      UserError: files are missing or damaged, or not those of a tokenizer of CLIP.
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


def _read_whole(path):
    """The vocabulary and both files of a tokenizer.json."""
    values = read_json(path)
    model = values.get("model")
    wrong = _difference(values) if isinstance(model, dict) else "it has no model"
    if wrong:
        raise UserError(f"{path} is no tokenizer of CLIP: {wrong}.")
    try:
        vocabulary = model["vocab"]
        # A list of two in newer files, with a space between them in older ones.
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


def _difference(values):
    """How a tokenizer.json parts or spells texts otherwise than CLIP does, or None."""
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
        return "its pre_tokenizer is another"
    return None


def _flat(stage, name):
    """The steps of a stage of a tokenizer.json."""
    if not isinstance(stage, dict):
        return []
    return stage.get(name) or [] if stage.get("type") == "Sequence" else [stage]


def _settings(folder):
    """{field: text} of the special tokens, and the tokens that a folder adds to its vocabulary."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found |= {
                field: value["content"] if isinstance(value, dict) and "content" in value else value
                for field, value in read_json(folder / name).items()
            }
    return found


def _contents(tokens):
    """Texts of a list of added tokens."""
    return [token.get("content") if isinstance(token, dict) else token for token in tokens or ()]


def _refuse_added(folder, settings, vocabulary):
    """Raises a UserError over tokens that transformers would add to the vocabulary."""
    decoder = settings.get("added_tokens_decoder")
    added = _contents(decoder.values()) if isinstance(decoder, dict) else []
    added += _contents(settings.get("additional_special_tokens"))
    if (folder / "added_tokens.json").exists():
        added += read_json(folder / "added_tokens.json")
    _refuse(folder, [token for token in added if token not in vocabulary])


def _refuse(path, added):
    if added:
        raise UserError(
            f"{path} adds tokens to CLIP's, such as {added[0]!r}: textual inversions and other "
            "additions are not supported; give a tokenizer without them."
        )


def fillers(folder):
    """Padding tokens of a pipeline's or model's folder, `FILLERS` where it states none.

    Args:
      folder: that of the pipeline, an `epath.Path`, with tokenizer/ and perhaps tokenizer_2/.

    Returns:
      A token for each of the two text encoders.
    """
    return tuple(
        _settings(folder / name).get("pad_token") or filler
        for name, filler in zip(("tokenizer", "tokenizer_2"), FILLERS)
    )


def save_fillers(folder, tokens):
    """Writes what `fillers` reads, where it is not SDXL's; the arguments are those of `fillers`."""
    if tuple(tokens) == FILLERS:
        return
    for name, token in zip(("tokenizer", "tokenizer_2"), tokens):
        replace_file(folder / name / "tokenizer_config.json", json.dumps({"pad_token": token}))
