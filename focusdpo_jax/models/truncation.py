"""A warning about texts that the tokenizer truncates."""

from collections.abc import Iterable, Sequence

from absl import logging

from focusdpo_jax.models.tokenizer import Tokenizer


def warn(tokenizer: Tokenizer, texts: Iterable[tuple[str, Sequence[str]]], source: str) -> int:
    """Logs one warning if any text is truncated: how many, the first of them, and its lost part.

    The warning also counts the texts that lose the phrase of a subject.

    Args:
      tokenizer: tokenizer of the model.
      texts: pairs of a text and the phrases of its subjects.
      source: origin of the texts for the message, such as "--prompt".

    Returns:
      The number of different texts that are truncated.
    """
    texts = dict.fromkeys((text, tuple(phrases)) for text, phrases in texts)
    whole = {
        text: tokenizer.split_at_length(text) for text in dict.fromkeys(text for text, _ in texts)
    }
    cut = [text for text, (_, lost) in whole.items() if lost]
    if not cut:
        return 0
    lost = {
        (text, phrase): None
        for text, phrases in texts
        if whole[text][1]
        for phrase in phrases
        if _is_lost(tokenizer, phrase, *whole[text])
    }
    phrases = ""
    if lost:
        named = list(dict.fromkeys(phrase for _, phrase in lost))
        phrases = (
            f". The model does not read {', '.join(map(repr, named[:5]))}"
            f"{' and others' if len(named) > 5 else ''}: {len({t for t, _ in lost})} of them "
            "lose the phrase of a subject"
        )
    logging.warning(
        "%s: %d of %d texts are longer than the %d tokens that the model reads and are cut. The "
        "first, %r, has %d and loses %r%s",
        source,
        len(cut),
        len(whole),
        tokenizer.length,
        cut[0],
        tokenizer.count(cut[0]),
        whole[cut[0]][1].strip(),
        phrases,
    )
    return len(cut)


def _is_lost(tokenizer: Tokenizer, phrase: str, kept: str, lost: str) -> bool:
    """Returns whether a phrase is in the whole text but not in the kept part."""
    phrase = f" {''.join(tokenizer.split_at_length(phrase))} "
    return bool(phrase.strip()) and phrase in f" {kept}{lost} " and phrase not in f" {kept} "
