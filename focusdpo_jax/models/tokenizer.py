"""CLIP's byte-pair tokenizer: captions to token ids for both of SDXL's text encoders."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.models import vocabulary


class Tokenizer:
    """CLIP's tokenizer in SDXL's two variants, one per text encoder.

    The variants differ in the token that pads short captions (`pad_tokens`): the first uses the end
    token, the second "!" (id 0), as in the published `tokenizer` and `tokenizer_2` folders. Since a
    pad token is a special token, a "!" in a caption has the same id 0 for the second encoder, and
    not 256, the "!" that ends a word. diffusers' pipelines behave in the same way.

    Attributes:
      length: tokens per caption.
      pad_tokens: the pad token of each text encoder.
    """

    def __init__(
        self, folder: epath.PathLike, length: int, pad_tokens: Sequence[str] = vocabulary.PAD_TOKENS
    ):
        """Reads a vocabulary.

        Args:
          folder: folder of the tokenizer's files (see `vocabulary.read`).
          length: tokens per caption, start and end token included.
          pad_tokens: the pad token of each text encoder.

        Raises:
          UserError: files are missing or damaged, or not those of a CLIP tokenizer.
        """
        import transformers  # Slow to import.

        self._files = vocabulary.read(epath.Path(folder))
        self.length, self.pad_tokens = length, tuple(pad_tokens)
        # Written to files again, so that both file layouts reach transformers in the same form.
        with tempfile.TemporaryDirectory() as copy:
            self._write(epath.Path(copy))
            self._encoders = [
                transformers.CLIPTokenizer(
                    vocab=f"{copy}/vocab.json", merges=f"{copy}/merges.txt", pad_token=pad_token
                )
                for pad_token in self.pad_tokens
            ]
        for encoder, pad_token in zip(self._encoders, self.pad_tokens):
            if len(encoder) > encoder.vocab_size:
                raise UserError(
                    f"{folder}: pad_token = {pad_token!r} is not in its vocabulary: give one that "
                    f"is, such as {vocabulary.END!r}."
                )

    @classmethod
    def of_words(cls, words: Iterable[str], length: int) -> "Tokenizer":
        """Builds a tokenizer with the vocabulary of `write_vocabulary`, without a folder."""
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(folder, words)
            return cls(folder, length)

    def save(self, folder: epath.PathLike) -> None:
        """Writes vocab.json and merges.txt to the tokenizer/ folder of a model.

        Pad tokens other than SDXL's are written beside it; see `vocabulary.save_pad_tokens`.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        vocabulary.save_pad_tokens(folder.parent, self.pad_tokens)

    def _write(self, folder: epath.Path) -> None:
        for name, content in self._files.items():
            replace_file(folder / name, content)

    def digest(self) -> str:
        """Returns a hash of everything that determines the tokens of a caption."""
        content = b"".join(self._files.values())
        if self.pad_tokens != vocabulary.PAD_TOKENS:
            content += json.dumps(self.pad_tokens).encode()
        return hashlib.sha256(content + str(self.length).encode()).hexdigest()

    def count(self, caption: str) -> int:
        """Returns the number of tokens of a caption before truncation, start and end included."""
        return len(self._encoders[0](caption)["input_ids"])

    def split_at_length(self, caption: str) -> tuple[str, str]:
        """Decodes the tokens of a caption to two texts: the part that is kept, and the rest."""
        tokens = self._encoders[0](caption)["input_ids"][1:-1]
        kept, whole = (
            str(self._encoders[0].decode(part, clean_up_tokenization_spaces=False))
            for part in (tokens[: self.length - 2], tokens)
        )
        # The kept part may end within a multi-byte character.
        return kept, whole[len(kept.rstrip("\ufffd")) :] if len(tokens) > self.length - 2 else ""

    def __call__(self, caption: str) -> Int[np.ndarray, "2 length"]:
        """Tokenizes a caption to int32 [2, length]; long captions are cut before the end token."""
        return np.array(
            [
                encoder(caption, truncation=True, max_length=self.length, padding="max_length")[
                    "input_ids"
                ]
                for encoder in self._encoders
            ],
            np.int32,
        )


def _byte_alphabet() -> list[str]:
    """Returns CLIP's printable characters for the 256 bytes, in the order of its vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]


def write_vocabulary(folder: epath.PathLike, words: Iterable[str]) -> int:
    """Writes a small CLIP vocabulary in which each of `words` is one token.

    All other text is tokenized by bytes, so that any prompt is valid.

    Returns:
      The number of tokens.
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
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False, indent=0))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(ids)
