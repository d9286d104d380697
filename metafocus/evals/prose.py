"""Sentences that facts are hidden in: from a text file, or from the documentation of Python."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from metafocus.data import stdlib_qa
from metafocus.errors import DataError
from metafocus.files import existing

_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z])")
_SHORTEST, _LONGEST = 10, 100  # words; BABILong's bound is the same number of tokens


@dataclass(frozen=True)
class Prose:
    """Sentences of 10 to 100 words, in the order of their text."""

    sentences: tuple[str, ...]

    def without(self, words: Iterable[str]) -> Prose:
        """Return the sentences that contain none of the words; the case does not matter.

        Raises:
            DataError: if no sentence is left.

        Example:
            >>> from metafocus.evals.prose import Prose
            >>> Prose(("Milk is white.", "The summary is short.")).without(["milk", "Mary"])
            Prose(sentences=('The summary is short.',))
        """
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
        kept = tuple(sentence for sentence in self.sentences if not pattern.search(sentence))
        if not kept:
            raise DataError("prose: every sentence contains a word of the task; pass another text")
        return Prose(kept)

    def stretch(self, start: int, n: int) -> list[str]:
        """Return n sentences in a row from number `start`; after the last one the text repeats."""
        size = len(self.sentences)
        return [self.sentences[(start + i) % size] for i in range(n)]

    def place(self, rng: random.Random) -> int:
        """Return the number of a random sentence."""
        return rng.randrange(len(self.sentences))


def split_sentences(text: str) -> list[str]:
    """Return the sentences of 10 to 100 words, without headings and lines of code.

    Example:
        >>> from metafocus.evals.prose import split_sentences
        >>> split_sentences("Short one. " + "Nine words " * 5 + "and a last one. No end")
        ['Nine words Nine words Nine words Nine words Nine words and a last one.']
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        for sentence in _END.split(" ".join(block.split())):
            size = sentence.count(" ") + 1
            if _SHORTEST <= size <= _LONGEST and sentence.rstrip("\"')]")[-1:] in (".", "!", "?"):
                found.append(sentence)
    return found


def prose_from_file(path: str | Path) -> Prose:
    """Return the sentences of a UTF-8 text file, such as a book.

    Raises:
        DataError: if the file does not exist, is not UTF-8, or has no sentence of 10 to 100 words.
    """
    path = existing(path, "name a text file in UTF-8")
    try:
        sentences = split_sentences(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"path={str(path)!r} is not UTF-8 ({error}): convert it") from error
    if not sentences:
        raise DataError(f"path={str(path)!r} holds no sentence of {_SHORTEST} words or more")
    return Prose(tuple(sentences))


@lru_cache(maxsize=3)
def builtin_prose(split: str | None = None) -> Prose:
    """Return the prose of the standard library's docstrings.

    Args:
        split: "train", "heldout", or None for both.

    Raises:
        DataError: if the split is unknown.
    """
    texts = stdlib_qa.texts(split)
    # The first line of an entry is its signature.
    sentences = [s for text in texts for s in split_sentences(text.partition("\n")[2])]
    return Prose(tuple(dict.fromkeys(sentences)))


@lru_cache(maxsize=1)
def builtin_words() -> tuple[str, ...]:
    """Return the distinct lower-case words of 4 to 12 letters in the built-in prose, sorted."""
    return words_of(stdlib_qa.texts(None))


def words_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct lower-case words of 4 to 12 letters in some texts, sorted.

    Example:
        >>> from metafocus.evals.prose import words_of
        >>> words_of(["Open the stream, then read it."])
        ('read', 'stream', 'then')
    """
    words = {w for t in texts for w in re.findall(r"(?<![\w.])[a-z]{4,12}(?![\w(]|\.\w)", t)}
    return tuple(sorted(w for w in words if not re.search(r"(.)\1\1", w)))
