"""HELMET's recall from JSON: the value of one key among many, all of them UUIDs.

The task is that of Liu et al. (2023), Lost in the Middle, as HELMET (Yen et al., 2024) runs it:
two pairs of the same object are shown as examples, the key is at one of six depths, and an
answer is right if it contains the value.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import TYPE_CHECKING

from metafocus.evals.draft import Draft, Plan, questions
from metafocus.evals.items import Count, Item, check_request, counter
from metafocus.evals.ruler.words import uuids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("json_kv",)
NEW_TOKENS = 100
DEPTHS = 6
_SHOTS = 2


def generate(
    tokenizer: PreTrainedTokenizerBase | Count,
    *,
    task: str = "json_kv",
    length: int,
    n: int,
    seed: int = 0,
) -> list[Item]:
    """Make `n` questions. Prompt and answer have almost `length` tokens, and never more.

    The depth of question i is number i modulo 6 of six equal steps from the first pair to the last.

    Args:
        tokenizer: a tokenizer, or a function that counts the tokens of a prompt.
        task: "json_kv".
        length: the number of tokens of the prompt and of the answer, for which 100 are reserved.
        n: the number of questions.
        seed: selects the keys and values.

    Raises:
        DataError: if the task is unknown, or if the length is too small for four pairs.

    Example:
        >>> from metafocus.evals import helmet
        >>> item, = helmet.generate(lambda text: len(text) // 4, length=1000, n=1)
        >>> item.references[0] in item.prompt[slice(*item.evidence[0])]
        True
    """
    check_request(TASKS, task, length, n)

    def plan(i: int) -> Plan:
        return _plan(random.Random(f"helmet {length} {seed} {i}"), (i % DEPTHS) / (DEPTHS - 1))

    count = counter(tokenizer)
    return questions(count, plan, suite="helmet", task=task, length=length, n=n, new=NEW_TOKENS)


def _plan(rng: random.Random, depth: float) -> Plan:
    drawn = uuids(rng)
    pairs: list[tuple[str, str]] = []
    picks = [rng.random() for _ in range(_SHOTS)]
    asked = "Extract the value of the key from the JSON object above."

    def build(n: int) -> Draft:
        pairs.extend(islice(zip(drawn, drawn, strict=True), max(n - len(pairs), 0)))
        own = pairs[:n]
        at = round(depth * (n - 1))
        key, value = own[at]
        others = [i for i in range(n) if i != at]
        first = int(picks[0] * len(others))
        shown = [
            others[first],
            others[(first + 1 + int(picks[1] * (len(others) - 1))) % len(others)],
        ]
        lines = [f'"{key}": "{value}"' for key, value in own]
        start = 1 + sum(len(line) + 2 for line in lines[:at])
        context = "{" + ", ".join(lines) + "}"
        examples = [f"Key: {own[i][0]}\nCorresponding value: {own[i][1]}" for i in shown]
        question = f"Key: {key}"
        return Draft(
            prompt="\n\n".join([context, asked, *examples, question]),
            question=question,
            prefix="Corresponding value:",
            answer=f"Corresponding value: {value}",
            references=(value,),
            evidence=((start, start + len(lines[at])),),
            depths=(start / len(context),),
            aligned=True,
        )

    return Plan(build, least=4)
