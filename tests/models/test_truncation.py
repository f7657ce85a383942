"""The warning about truncated texts: how many, what is lost, and which subjects."""

import pathlib

import pytest

import focusdpo_jax
from focusdpo_jax.models import truncation
from focusdpo_jax.models.tokenizer import Tokenizer

FOLDER = pathlib.Path(focusdpo_jax.__file__).parent / "assets" / "toybox" / "tokenizer"
LONG = "a star and a ball and a ring and a cross and a heart and a box on grass"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(FOLDER, 16)


def test_a_text_is_split_at_the_length(tokenizer):
    """As diffusers decodes the removed part: the ids after the last that is kept."""
    assert tokenizer.split_at_length("a star on grass") == ("a star on grass", "")
    kept, lost = tokenizer.split_at_length(LONG)
    assert kept == "a star and a ball and a ring and a cross and a heart"
    assert lost == " and a box on grass"
    (encoder, _), ids = tokenizer._encoders, tokenizer(LONG)[0]
    removed = encoder(LONG)["input_ids"][tokenizer.length - 1 : -1]
    assert encoder.decode(removed) == lost.strip()
    assert encoder.decode(ids[1:-1]) == kept
    # Sixteen tokens fit, seventeen do not; the cut may be within the bytes of a character.
    assert (
        tokenizer.split_at_length("a " * 14)[1] == ""
        and tokenizer.split_at_length("a " * 15)[1] == " a"
    )
    assert (
        tokenizer.split_at_length("\u65e5\u672c\u8a9e\u306e\u3068\u3066\u3082")[1]
        == "\u3068\u3066\u3082"
    )


def test_one_warning_with_count_limit_tail_and_subjects(tokenizer, caplog):
    texts = [
        ("a star", ["a star"]),
        (LONG, ["a star", "a heart", "a box", "a moon"]),
        (LONG, ["a star"]),
        ("a ball " * 9, ["a ball"]),
    ]
    assert truncation.warn(tokenizer, texts, "--prompts=x") == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "--prompts=x: 2 of 3 texts are longer than the 16 tokens that the model reads and are cut. "
        f"The first, '{LONG}', has 23 and loses 'and a box on grass'. The model does not read "
        "'a box': 1 of them lose the phrase of a subject"
    )
    caplog.clear()
    assert truncation.warn(tokenizer, [("a ball " * 9, ["a ball"])], "x") == 1
    assert "not told" not in caplog.text  # Named before the end as well.
    caplog.clear()
    assert truncation.warn(tokenizer, texts[:1], "x") == 0 and not caplog.records
