"""Variable tracking: which variables have a value, after a chain of assignments."""

from __future__ import annotations

import random
import string
from itertools import islice

from metafocus.evals.ruler.draft import Draft, Plan, hide, listed
from metafocus.evals.ruler.words import NOISE, letters

CHAINS, HOPS = 1, 4  # the published settings


def plan(rng: random.Random) -> Plan:
    """Draw the chain and its places; statements keep their order between lines of noise."""
    names = tuple(islice(letters(rng, 5, string.ascii_uppercase), HOPS + 1))
    value = str(rng.randint(10000, 99998))
    sources = [value, *(f"VAR {name}" for name in names)]
    statements = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    draws = sorted(rng.random() for _ in statements)
    heading = (
        "Variables are set among the following lines, each to a number or to the value of "
        "another variable. Follow the assignments.\n\n"
    )
    question = f"Which variables have the value {value}? There are {len(names)} of them."
    prefix = f"The variables with the value {value} are"

    def build(n: int) -> Draft:
        slots = [int((n + 1) * draw) for draw in draws]
        text, spans, depths = hide(heading, [NOISE] * n, statements, slots, "\n")
        return Draft(
            prompt=f"{text}\n\n{question}",
            question=question,
            prefix=prefix,
            answer=f"{prefix} {listed(names)}.",
            references=names,
            evidence=spans,
            depths=depths,
            aligned=True,
        )

    return Plan(build)
