"""Captions to token ids for both text encoders, by CLIP's byte-pair encoding."""

import hashlib
import json
import tempfile

import numpy as np
from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.models import vocabulary


class Tokenizer:
    """CLIP's tokenizer as SDXL uses it: once for each of its two text encoders.

    The encoders differ in the token that fills up short captions (`fillers`): the first takes the end
    token, the second "!" (id 0), as in the published `tokenizer` and `tokenizer_2` folders. As what fills
    up is a token apart, a "!" of the caption is that one, too, for the second encoder (id 0, and
    not 256, the end of a word); diffusers' pipelines do it so.
    """

    def __init__(self, folder, length, fillers=vocabulary.FILLERS):
        """Reads the vocabulary of `folder` (see `vocabulary.read`); captions get `length` tokens.

        Args:
          fillers: the token that fills up short captions, for each encoder.

        Raises:
          UserError: files are missing or damaged, or not those of a tokenizer of CLIP.
        """
        import transformers  # Slow to import, so only where captions are read.

        self._files = vocabulary.read(epath.Path(folder))
        self.length, self.fillers = length, tuple(fillers)
        # Through files, which transformers reads in the same way whatever they were read from.
        with tempfile.TemporaryDirectory() as copy:
            self._write(epath.Path(copy))
            self._encoders = [
                transformers.CLIPTokenizer(
                    vocab=f"{copy}/vocab.json", merges=f"{copy}/merges.txt", pad_token=filler
                )
                for filler in self.fillers
            ]
        for encoder, filler in zip(self._encoders, self.fillers):
            if len(encoder) > encoder.vocab_size:
                raise UserError(
                    f"{folder}: pad_token = {filler!r} is not in its vocabulary: give one that "
                    f"is, such as {vocabulary.END!r}."
                )

    @classmethod
    def of_words(cls, words, length):
        """A tokenizer that lies in no folder, with the vocabulary of `write_vocabulary`."""
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(folder, words)
            return cls(folder, length)

    def save(self, folder):
        """Writes the vocabulary, as vocab.json and merges.txt, to a model's tokenizer/."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        vocabulary.save_fillers(folder.parent, self.fillers)

    def _write(self, folder):
        for name, content in self._files.items():
            replace_file(folder / name, content)

    def digest(self):
        """Changes when a caption's tokens may."""
        content = b"".join(self._files.values())
        if self.fillers != vocabulary.FILLERS:
            content += json.dumps(self.fillers).encode()
        return hashlib.sha256(content + str(self.length).encode()).hexdigest()

    def count(self, caption):
        """How many tokens a caption has, start and end among them, however many are read."""
        return len(self._encoders[0](caption)["input_ids"])

    def spell(self, caption):
        """A caption as its tokens spell it, in two texts: what is read of it, and what is cut off."""
        tokens = self._encoders[0](caption)["input_ids"][1:-1]
        kept, whole = (
            self._encoders[0].decode(part, clean_up_tokenization_spaces=False)
            for part in (tokens[: self.length - 2], tokens)
        )
        # The end of what is read may be a part of a letter.
        return kept, whole[len(kept.rstrip("\ufffd")) :] if len(tokens) > self.length - 2 else ""

    def __call__(self, caption):
        """Maps a caption to int32 [2, length]; what is too long is cut off before the end token."""
        return np.array(
            [
                encoder(caption, truncation=True, max_length=self.length, padding="max_length")[
                    "input_ids"
                ]
                for encoder in self._encoders
            ],
            np.int32,
        )


def _byte_alphabet():
    """CLIP's visible stand-ins for the 256 bytes, in the order of its vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]


def write_vocabulary(folder, words):
    """Writes a small CLIP vocabulary in which every one of `words` is one token.

    Every other text still has tokens, one a byte, so that any prompt can be given.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_alphabet()
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges = []
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(vocabulary)
