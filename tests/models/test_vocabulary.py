"""Files of CLIP's tokenizer, made by the tests; tests/parity/test_tokenizer.py uses CLIP's own vocabulary."""

import json

import numpy as np
import pytest
import transformers

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import vocabulary
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary

CAPTION = "A red  boat! (naïve)"


@pytest.fixture
def pair(tmp_path):
    """A folder with vocab.json and merges.txt."""
    write_vocabulary(tmp_path / "pair", ["a", "red", "boat"])
    return tmp_path / "pair"


@pytest.fixture
def whole(pair, tmp_path):
    """The same tokenizer as transformers 5 saves it: tokenizer.json and tokenizer_config.json."""
    transformers.CLIPTokenizer(
        vocab=str(pair / "vocab.json"),
        merges=str(pair / "merges.txt"),
    ).save_pretrained(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    return tmp_path / "whole"


def change(folder, name, **fields):
    """Changes fields of a JSON file; a dict changes those inside."""
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    for field, value in fields.items():
        both = isinstance(value, dict) and isinstance(values.get(field), dict)
        values[field] = values[field] | value if both else value
    path.write_text(json.dumps(values))


def test_one_file_is_the_same_tokenizer(pair, whole, tmp_path):
    expected, found = Tokenizer(pair, 16), Tokenizer(whole, 16)
    np.testing.assert_array_equal(found(CAPTION), expected(CAPTION))
    assert found.count(CAPTION) == expected.count(CAPTION)
    found.save(tmp_path / "model" / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["tokenizer"]
    assert sorted(path.name for path in (tmp_path / "model/tokenizer").iterdir()) == [
        "merges.txt",
        "vocab.json",
    ]
    again = Tokenizer(tmp_path / "model/tokenizer", 16)
    np.testing.assert_array_equal(again(CAPTION), expected(CAPTION))
    assert again.digest() == found.digest()


def test_merges_of_older_files(whole):
    """transformers 4 wrote "a b" where newer ones write ["a", "b"]."""
    expected = Tokenizer(whole, 16)(CAPTION)
    model = json.loads((whole / "tokenizer.json").read_text())["model"]
    change(
        whole, "tokenizer.json", model={"merges": [" ".join(merge) for merge in model["merges"]]}
    )
    np.testing.assert_array_equal(Tokenizer(whole, 16)(CAPTION), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": {"type": "Unigram"}}, "its model is 'Unigram' and not 'BPE'"),
        ({"model": {"end_of_word_suffix": None}}, "end_of_word_suffix = None .not '</w>'"),
        ({"normalizer": None}, r"its normalizer is \[\] .not NFC, Replace, Lowercase"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "pretokenizers": None}},
            "its pre_tokenizer is not CLIP",
        ),
        ({"model": None}, "it has no model"),
    ],
)
def test_tokenizers_of_other_models_are_refused(whole, fields, message):
    change(whole, "tokenizer.json", **fields)
    with pytest.raises(UserError, match=f"tokenizer.json is not a CLIP tokenizer: {message}"):
        Tokenizer(whole, 16)


def test_special_tokens_of_other_models_are_refused(whole):
    change(whole, "tokenizer_config.json", bos_token={"content": "<s>"})
    with pytest.raises(
        UserError, match="bos_token = '<s>': only CLIP's '<|startoftext|>' is supported"
    ):
        Tokenizer(whole, 16)


@pytest.mark.parametrize("kind", ["pair", "whole"])
def test_added_tokens_are_refused(kind, pair, whole, request):
    """transformers would give them ids that the text encoder was not trained on."""
    folder = {"pair": pair, "whole": whole}[kind]
    change(folder, "added_tokens.json", **{"<|endoftext|>": 1})
    Tokenizer(folder, 16)  # In the vocabulary anyway.
    change(folder, "added_tokens.json", **{"<sks>": 999})
    with pytest.raises(UserError, match="adds tokens to CLIP's, such as '<sks>'"):
        Tokenizer(folder, 16)


def test_a_tokenizer_to_which_transformers_added(pair, tmp_path):
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(pair / "vocab.json"), merges=str(pair / "merges.txt")
    )
    tokenizer.add_tokens(["<sks>"])
    tokenizer.save_pretrained(tmp_path / "added")
    with pytest.raises(UserError, match="tokenizer.json adds tokens to CLIP's, such as '<sks>'"):
        Tokenizer(tmp_path / "added", 16)


def test_missing_and_damaged_files(whole, tmp_path):
    with pytest.raises(
        UserError,
        match="vocab.json and .*merges.txt are missing; a folder of CLIP's "
        "tokenizer has vocab.json and merges.txt, or tokenizer.json",
    ):
        Tokenizer(tmp_path / "nowhere", 16)
    for text, message in (
        ("{", "is damaged: Expecting"),
        ("[]", "it is not a JSON object"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a pointer of git-lfs and not the file itself: run `git lfs pull`",
        ),
        ('{"model": {"type": "BPE"}}', "is not a CLIP tokenizer"),
    ):
        (whole / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=f"tokenizer.json .*{message}"):
            Tokenizer(whole, 16)


def test_pad_tokens(pair, tmp_path):
    """Pad tokens of a pipeline are read, compared with transformers', and kept in a model folder."""
    for name, pad_token in (("tokenizer", "!"), ("tokenizer_2", "<|endoftext|>")):
        transformers.CLIPTokenizer(
            vocab=str(pair / "vocab.json"),
            merges=str(pair / "merges.txt"),
            pad_token=pad_token,
            model_max_length=16,
        ).save_pretrained(tmp_path / "pipe" / name)
    assert vocabulary.pad_tokens(pair.parent) == vocabulary.PAD_TOKENS
    pad_tokens = vocabulary.pad_tokens(tmp_path / "pipe")
    assert pad_tokens == ("!", "<|endoftext|>")
    ours = Tokenizer(tmp_path / "pipe/tokenizer", 16, pad_tokens)
    expected = [
        transformers.CLIPTokenizer.from_pretrained(tmp_path / "pipe" / name)(
            "a boat!", padding="max_length", max_length=16, truncation=True
        )["input_ids"]
        for name in ("tokenizer", "tokenizer_2")
    ]
    np.testing.assert_array_equal(ours("a boat!"), expected)
    ours.save(tmp_path / "model/tokenizer")
    assert vocabulary.pad_tokens(tmp_path / "model") == pad_tokens
    assert ours.digest() != Tokenizer(pair, 16).digest()
    with pytest.raises(UserError, match="pad_token = '<pad>' is not in its vocabulary"):
        Tokenizer(pair, 16, ("<pad>", "!"))
