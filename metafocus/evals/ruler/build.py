"""Makes the tasks of RULER by name, for a given number of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from metafocus.errors import DataError
from metafocus.evals.draft import Plan, fitted
from metafocus.evals.items import Count, Item, check_request, counter
from metafocus.evals.prose import Prose, builtin_prose, builtin_words
from metafocus.evals.ruler import frequency, niah, qa, tracking
from metafocus.evals.ruler.words import word_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = (*niah.NIAH, "vt", "cwe", "fwe", "qa")
# The published numbers of new tokens; all tasks of niah have the same number.
NEW_TOKENS = {**dict.fromkeys(niah.NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_TOKENS_PER_WORD = 10  # for cwe, where an uncommon word occurs three times with a number before it


def generate(
    tokenizer: PreTrainedTokenizerBase | Count,
    *,
    task: str,
    length: int,
    n: int,
    seed: int = 0,
    prose: Prose | None = None,
    words: Sequence[str] | None = None,
    questions: Sequence[qa.Question] | None = None,
) -> list[Item]:
    """Make `n` questions. Prompt and answer have almost `length` tokens, and never more.

    The published number of tokens is reserved for the answer. The first words of the answer
    (`answer_prefix`) are not part of the prompt, but they are counted. The same tokenizer, texts
    and seed give the same prompts, and question i does not depend on `n`. Every question has an
    order, keys and values of its own. If there are too few documents, the prompt is shorter.

    Args:
        tokenizer: a tokenizer, or a function that counts the tokens of a prompt.
        task: one of `TASKS`.
        length: the number of tokens of prompt, prefix and answer.
        n: the number of questions.
        seed: selects the questions.
        prose: the essays of niah. Default: the docstrings of the standard library.
        words: the words of cwe. Default: the words of these docstrings, and pairs of words if
            there are too few.
        questions: the questions of qa, from `read_questions`.

    Raises:
        DataError: if the task is unknown, if qa has no questions, if there are too few words, or
            if the length is too small for the question.

    Example:
        >>> from metafocus.evals import ruler
        >>> item, = ruler.generate(lambda text: len(text.split()), task="vt", length=300, n=1)
        >>> [item.prompt[a:b].split()[1] for a, b in item.evidence] == list(item.references)
        True
    """
    check_request(TASKS, task, length, n)
    count = counter(tokenizer)
    if task in niah.NIAH and niah.NIAH[task].haystack == "essay":
        prose = _without_numbers(builtin_prose() if prose is None else prose)
    if task == "cwe":
        words = _word_pool(length) if words is None else tuple(dict.fromkeys(words))
        if len(words) < 100:
            raise DataError(f"words holds {len(words)} different words: give at least 100")
    if task == "qa":
        if not questions:
            raise DataError("task='qa' needs questions: pass read_questions(path)")
        questions = tuple(questions)
    return [
        _item(count, task, length, _plan(count, task, length, seed, i, prose, words, questions))
        for i in range(n)
    ]


def _plan(
    count: Count,
    task: str,
    length: int,
    seed: int,
    i: int,
    prose: Prose | None,
    words: Sequence[str] | None,
    questions: Sequence[qa.Question] | None,
) -> Plan:
    rng = random.Random(f"ruler {task} {length} {seed} {i}")
    if task == "vt":
        return tracking.plan(rng, length, count)
    if task == "cwe":
        assert words is not None
        return frequency.plan_common(rng, length, words)
    if task == "fwe":
        return frequency.plan_frequent(rng, length, NEW_TOKENS[task])
    if task == "qa":
        assert questions is not None
        size = len(questions)
        order = random.Random(f"ruler qa {seed}").sample(range(size), size)
        return qa.plan(rng, questions, order[i % size])
    return niah.plan(niah.NIAH[task], rng, prose)


def _item(count: Count, task: str, length: int, plan: Plan) -> Item:
    new = NEW_TOKENS[task]
    item, n = fitted(count, plan, suite="ruler", task=task, length=length, new=new)
    if n == plan.most and task == "cwe":
        size = count(f"{item.prompt}\n{item.answer_prefix}") + new
        if size < length // 2:
            raise DataError(f"words are too few for length={length}: give more than {n}")
    return item


def _without_numbers(prose: Prose) -> Prose:
    """Return the prose without sentences that hold a number like the values."""
    kept = tuple(s for s in prose.sentences if not re.search(r"\d{7}|[0-9a-f]{8}-", s))
    if not kept:
        raise DataError("prose: every sentence contains a long number; pass another text")
    return Prose(kept)


def _word_pool(length: int) -> tuple[str, ...]:
    """Return plain words and, from about 40k tokens on, pairs of words too."""
    words = builtin_words()
    missing = length // _TOKENS_PER_WORD - len(words)
    return words if missing <= 0 else (*words, *islice(word_keys(random.Random("cwe")), missing))
