"""Captions to token ids as transformers' tokenizers do it for SDXL, with CLIP's real vocabulary."""

import numpy as np
import pytest

from focusdpo_jax.models.tokenizer import Tokenizer
from tests.shared import shared

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

PROMPTS = [
    "",
    " ",
    "\n\t  \r\n",
    "a",
    "A Dog",
    "a  dog   in\tthe\nsnow",
    "don't, we'll, I'M, they've'd",
    "!",
    "!!!",
    "a!",
    "! ! !",
    "...",
    "?!",
    "\"quoted\" 'single' `tick`",
    "(((masterpiece:1.3)))",
    "[from:to:0.5]",
    "a_snake_case word",
    "half-life-size",
    "e-mail: a.b@c.org",
    "https://example.org/?q=a&b=%20",
    "#hash @at $5.00 50% & co.",
    "1234567890",
    "3.14159",
    "1,000",
    "the 80s, 4k, 8K, 16:9",
    "½ ² ™ © ° €",
    "“curly” ‘quotes’ – dash — dash …",
    "naïve café",
    "nai\u0308ve cafe\u0301",
    "Ünïcödé ÄÖÜ ß ẞ",
    "İstanbul ıŞ",
    "ﬁne ligature ﬀ",
    "ＦＵＬＬＷＩＤＴＨ ｈａｌｆ",
    "犬と猫",
    "한국어 강아지",
    "собака и кошка",
    "كلب وقطة",
    "कुत्ता",
    "🐶",
    "👩\u200d👧\u200d👦 family",
    "a🐕b",
    "zero\u200bwidth",
    "non\u00a0breaking",
    "soft\u00adhyphen",
    "\ufeffbyte order mark",
    "control\x07bell",
    "<|startoftext|> a dog <|endoftext|> and more",
    "<|endoftext|>",
    "&amp;lt;b&gt; &quot;html&quot;",
    "antidisestablishmentarianism " * 3,
    "dog " * 75,
    "dog " * 76,
    "a very long prompt that goes on, " * 40,
    "x" * 300,
    "0" * 80,
    "\\n \\t {a|b} <lora:x:1>",
]


@pytest.fixture(scope="module")
def folder():
    return shared("clip-tokenizer")


def test_prompts(folder):
    """Filled up with the end of the text for the first encoder and with "!" for the second."""
    assert len(set(PROMPTS)) >= 50
    ours = Tokenizer(folder, 77)
    theirs = [
        transformers.CLIPTokenizer.from_pretrained(folder, pad_token=padding)
        for padding in ("<|endoftext|>", "!")
    ]
    for prompt in PROMPTS:
        expected = [
            tokenizer(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
            for tokenizer in theirs
        ]
        found = ours(prompt)
        assert found.shape == (2, 77)
        np.testing.assert_array_equal(found, expected, err_msg=repr(prompt))


def test_ids_of_the_original(folder):
    """The first row equals that of openai/CLIP, independently of transformers."""
    first, second = Tokenizer(folder, 12)("A photo of a cat!")
    assert first.tolist() == [49406, 320, 1125, 539, 320, 2368, 256] + [49407] * 5
    # For the second encoder "!" is what fills up, wherever it stands.
    assert second.tolist() == [49406, 320, 1125, 539, 320, 2368, 0, 49407] + [0] * 4


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_one_file_is_the_same(folder, tmp_path, padding):
    """A folder that transformers 5 saved, which has tokenizer.json alone."""
    transformers.CLIPTokenizer.from_pretrained(folder, pad_token=padding).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists() and not (tmp_path / "merges.txt").exists()
    expected, found = Tokenizer(folder, 77), Tokenizer(tmp_path, 77)
    for prompt in PROMPTS:
        np.testing.assert_array_equal(found(prompt), expected(prompt), err_msg=repr(prompt))
        assert found.count(prompt) == expected.count(prompt)
