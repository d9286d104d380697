"""Needles that share no word with their question, in the manner of NoLiMa.

In NoLiMa (Modarressi et al., 2025) literal matching does not find the needle: it names a building,
and the question asks for the city or the country. Needles, names and questions here are our own.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from metafocus.evals.draft import Draft, Plan, hide, questions
from metafocus.evals.items import Count, Item, check_request, counter
from metafocus.evals.prose import Prose, builtin_prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("onehop", "twohop", "onehop_inverted", "twohop_inverted")
NEW_TOKENS = 32

# A building, its city (one step away) and its country (two steps away).
PLACES = (
    ("Brandenburg Gate", "Berlin", "Germany"),
    ("Eiffel Tower", "Paris", "France"),
    ("Colosseum", "Rome", "Italy"),
    ("Sagrada Familia", "Barcelona", "Spain"),
    ("Tower Bridge", "London", "England"),
    ("Hagia Sophia", "Istanbul", "Turkey"),
    ("Acropolis", "Athens", "Greece"),
    ("Charles Bridge", "Prague", "Czechia"),
    ("Schonbrunn Palace", "Vienna", "Austria"),
    ("Rijksmuseum", "Amsterdam", "Holland"),
    ("Tivoli Gardens", "Copenhagen", "Denmark"),
    ("Belem Tower", "Lisbon", "Portugal"),
    ("Bolshoi Theatre", "Moscow", "Russia"),
    ("Forbidden City", "Beijing", "China"),
    ("Meiji Shrine", "Tokyo", "Japan"),
    ("Gyeongbokgung Palace", "Seoul", "Korea"),
    ("Taj Mahal", "Agra", "India"),
    ("Statue of Liberty", "Manhattan", "America"),
    ("Space Needle", "Seattle", "America"),
    ("Casa Rosada", "Buenos Aires", "Argentina"),
    ("Table Mountain", "Cape Town", "South Africa"),
    ("Giza pyramids", "Cairo", "Egypt"),
    ("Petronas Towers", "Kuala Lumpur", "Malaysia"),
    ("Atomium", "Brussels", "Belgium"),
)
NAMES = (
    "Ada", "Bram", "Caleb", "Diego", "Esther", "Farid", "Greta", "Hiro", "Ingrid", "Jamal",
    "Kira", "Leon", "Mandy", "Nils", "Olga", "Priya", "Quentin", "Ravi", "Stella", "Yuki",
)  # fmt: skip
_ASK = (
    "Answer the question at the end from the following text. The text states the answer, or it "
    "follows from the text and from what everybody knows. Answer with a name only.\n\n"
)


def generate(
    tokenizer: PreTrainedTokenizerBase | Count,
    *,
    task: str,
    length: int,
    n: int,
    seed: int = 0,
    prose: Prose | None = None,
) -> list[Item]:
    """Make `n` questions. Prompt and answer have almost `length` tokens, and never more.

    Args:
        tokenizer: a tokenizer, or a function that counts the tokens of a prompt.
        task: "onehop" asks for the city of a building, "twohop" for its country. In the tasks with
            "_inverted" the name stands at the end of the needle.
        length: the number of tokens of the prompt and of the answer, for which 32 are reserved.
        n: the number of questions.
        seed: selects the questions.
        prose: the text around the needle. Default: the docstrings of the standard library.
            Sentences with a name of a person or a place are left out.

    Raises:
        DataError: if the task is unknown, the prose has no usable sentence, or the length is too
            small.

    Example:
        >>> from metafocus.evals import nolima
        >>> item, = nolima.generate(lambda t: len(t.split()), task="twohop", length=300, n=1)
        >>> nolima.shared_words(item.prompt[slice(*item.evidence[0])], item.question)
        set()
    """
    check_request(TASKS, task, length, n)
    words = {word for row in PLACES for name in row for word in (name, *name.split())}
    noise = (builtin_prose() if prose is None else prose).without(
        sorted({*NAMES, *(word for word in words if word[:1].isupper())})
    )

    def plan(i: int) -> Plan:
        return _plan(random.Random(f"nolima {task} {length} {seed} {i}"), task, noise)

    count = counter(tokenizer)
    return questions(count, plan, suite="nolima", task=task, length=length, n=n, new=NEW_TOKENS)


def _plan(rng: random.Random, task: str, noise: Prose) -> Plan:
    name, (building, city, country) = rng.choice(NAMES), rng.choice(PLACES)
    needle = f"Actually, {name} lives next to the {building}."
    if task.endswith("_inverted"):
        needle = f"The {building} stands next door, where at home one meets {name}."
    question = f"Which character has been to {city if task.startswith('one') else country}?"
    draw, start = rng.random(), noise.place(rng)

    def build(n: int) -> Draft:
        text, spans, depths = hide(
            _ASK, noise.stretch(start, n), [needle], [int((n + 1) * draw)], " "
        )
        return Draft(
            prompt=f"{text}\n\nQuestion: {question}",
            question=question,
            prefix="",
            answer=f"{name}.",
            references=(name,),
            evidence=spans,
            depths=depths,
            aligned=True,
        )

    return Plan(build)


_COMMON = frozenset("a an and at by has in is it of on one the to where which".split())


def shared_words(needle: str, question: str) -> set[str]:
    """Return the words that a needle and a question share, without articles and prepositions."""
    one, other = (set(re.findall(r"[a-z]+", text.lower())) - _COMMON for text in (needle, question))
    return one & other
