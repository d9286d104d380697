"""RULER's tasks by name, sized to a number of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

from metafocus.errors import DataError
from metafocus.evals.fit import largest
from metafocus.evals.items import Count, Item, check_request, counter
from metafocus.evals.prose import Prose, builtin_prose, builtin_words
from metafocus.evals.ruler import frequency, niah, qa, tracking
from metafocus.evals.ruler.draft import Draft, Plan
from metafocus.evals.ruler.words import word_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = (*niah.NIAH, "vt", "cwe", "fwe", "qa")
# The published numbers of tokens to generate; those of niah are for each of its tasks.
NEW_TOKENS = {**dict.fromkeys(niah.NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_TOKENS_PER_WORD = 10  # of cwe, where an uncommon word comes three times with a number before it


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
    """Make `n` questions; prompt and answer have nearly, and never more than, `length` tokens.

    For the answer the published number of tokens is kept free. The words that the answer begins
    with (`answer_prefix`) are no part of the prompt, but counted. The same tokenizer, texts and
    seed give the same prompts, and question i does not depend on `n`; every question has its own
    order, keys and values. A task that runs out of documents stays shorter.

    Args:
        tokenizer: a tokenizer, or a function that counts the tokens of a prompt.
        task: one of `TASKS`.
        length: tokens of prompt, prefix and answer.
        n: how many questions.
        seed: which questions.
        prose: the essays of niah; default: the docstrings of the standard library.
        words: the words of cwe; default: those of these docstrings, and pairs of words where
            they do not suffice.
        questions: those of qa, from `read_questions`.

    Raises:
        DataError: an unknown task, qa without questions, too few words, or a length that cannot
            hold the question.

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
    if task == "qa" and not questions:
        raise DataError("task='qa' needs questions: pass read_questions(path)")
    return [
        _item(count, task, length, _plan(task, length, seed, i, prose, words, questions))
        for i in range(n)
    ]


def _plan(
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
        return tracking.plan(rng)
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

    def size(n: int) -> int:
        draft = plan.build(n)
        return count(f"{draft.prompt}\n{draft.prefix}") + new

    # Half a per cent short of the length is near enough; the last steps are the dear ones.
    n = largest(size, length, least=plan.least, most=plan.most, slack=max(8, length // 200))
    if n is None:
        raise DataError(
            f"length={length} cannot hold {task}, which takes {size(plan.least)} tokens with "
            f"{new} for the answer: raise it"
        )
    draft = plan.build(n)
    if n == plan.most and task == "cwe" and size(n) < length // 2:
        raise DataError(f"words are too few for length={length}: give more than {n}")
    return _as_item(draft, task, length)


def _as_item(draft: Draft, task: str, length: int) -> Item:
    found = asdict(draft)
    found["answer_prefix"] = found.pop("prefix")
    return Item(suite="ruler", task=task, length=length, new_tokens=NEW_TOKENS[task], **found)


def _without_numbers(prose: Prose) -> Prose:
    """Leave out what could be taken for a value."""
    kept = tuple(s for s in prose.sentences if not re.search(r"\d{7}|[0-9a-f]{8}-", s))
    if not kept:
        raise DataError("prose: every sentence contains a long number; pass another text")
    return Prose(kept)


def _word_pool(length: int) -> tuple[str, ...]:
    """Plain words, and from about 40k tokens on pairs of words among them, common ones or not."""
    words = builtin_words()
    missing = length // _TOKENS_PER_WORD - len(words)
    return words if missing <= 0 else (*words, *islice(word_keys(random.Random("cwe")), missing))
