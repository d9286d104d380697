"""Tasks of counting words: common words in a list (cwe), frequent words in a text (fwe)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import islice

from metafocus.errors import DataError
from metafocus.evals.draft import Draft, Plan
from metafocus.evals.ruler.words import letters

COMMON = 10
LONG = 4096  # from this many tokens on, words occur 30 and 3 times instead of 6 and 1
ALPHA, LETTERS, TOKENS_PER_WORD = 2.0, 6, 50  # fwe: one word of vocabulary for 50 tokens
# From 53 words on, the ranks 2 to 5 have different counts after rounding.
_FEWEST = 53
_SHOWN = (2, 1, 10)  # the solved example (our choice): common, uncommon, number of uncommon words


def repeats(length: int) -> tuple[int, int]:
    """Return how often a common and an uncommon word occur."""
    return (30, 3) if length >= LONG else (6, 1)


def plan_common(rng: random.Random, length: int, words: Sequence[str]) -> Plan:
    """Draw the words; the number of uncommon words is still to be chosen."""
    pool = rng.sample(words, len(words))
    spare = COMMON + _SHOWN[2]
    shown, pool = pool[:spare], pool[spare:]
    often, seldom = repeats(length)
    seed = rng.random()
    example = _numbered(_mixed(shown, *_SHOWN[:2], random.Random(seed)))
    ask = f"Which {COMMON} words are the most common in the list?"
    prefix = f"The {COMMON} most common words of the list are:"
    heading = (
        "Below is a numbered list of words, in which some words occur more often than the "
        f"others.\n\n{example}\n\n{ask}\n{prefix} {_numbered(shown[:COMMON])}\n\n"
        "Here is another list.\n\n"
    )

    def build(n: int) -> Draft:
        order = _mixed(pool[: COMMON + n], often, seldom, random.Random(seed + n))
        references = tuple(pool[:COMMON])
        return Draft(
            prompt=f"{heading}{_numbered(order)}\n\n{ask}",
            question=ask,
            prefix=prefix,
            answer=f"{prefix} {_numbered(references)}",
            references=references,
        )

    return Plan(build, least=1, most=len(pool) - COMMON)


def _mixed(words: Sequence[str], often: int, seldom: int, rng: random.Random) -> list[str]:
    every = [*words[:COMMON]] * often + [*words[COMMON:]] * seldom
    rng.shuffle(every)
    return every


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def zipf_counts(n: int, vocabulary: int) -> list[int]:
    """Return how often the word of each rank k occurs: n k^-2 / zeta(2), rounded down.

    Example:
        >>> from metafocus.evals.ruler.frequency import zipf_counts
        >>> zipf_counts(100, 5)
        [60, 15, 6, 3, 2]
    """
    zeta = math.pi**2 / 6
    return [int(n * rank**-ALPHA / zeta) for rank in range(1, vocabulary + 1)]


def plan_frequent(rng: random.Random, length: int, new_tokens: int) -> Plan:
    """Draw the vocabulary by rank; the first word is noise, the next three are the answer."""
    size = (length - new_tokens) // TOKENS_PER_WORD
    if size < 5:
        least = 5 * TOKENS_PER_WORD + new_tokens
        raise DataError(f"length={length} is too short for fwe: pass at least {least}")
    words = ["...", *islice(letters(rng, LETTERS), size - 1)]
    seed = rng.random()
    question = "Leaving out the dots '...', which three coded words are the most frequent?"
    prefix = "The three most frequent coded words are"
    heading = "The following text is made of coded words. Count how often each occurs.\n\n"
    references = tuple(words[1:4])

    def build(n: int) -> Draft:
        counts = zipf_counts(n, size)
        every = [word for word, k in zip(words, counts, strict=True) for _ in range(k)]
        random.Random(seed + n).shuffle(every)
        return Draft(
            prompt=f"{heading}{' '.join(every)}\n\n{question}",
            question=question,
            prefix=prefix,
            answer=f"{prefix} {', '.join(references)}.",
            references=references,
        )

    return Plan(build, least=_FEWEST)
