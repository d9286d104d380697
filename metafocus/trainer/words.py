"""Words of command lines and configuration files, and the objects they stand for.

Here alone a word stands for an object. In Python objects are passed, and need no name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metafocus import masks
from metafocus.autodiff.hvp import hvp_finite, hvp_forward
from metafocus.errors import DataError
from metafocus.estimators import Estimator, FirstOrder, Implicit, Unrolled
from metafocus.linear import CG
from metafocus.lm import all_tokens, answer_tokens, context_tokens

MASKS = {
    "causal": masks.causal,
    "prefix-lm": masks.prefix_lm,
    "context-bidirectional": masks.context_bidirectional,
    "full": masks.full,
}

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "first-order": FirstOrder,
    "unrolled-last-1": lambda: Unrolled(last=1),
    "unrolled": Unrolled,
    "unrolled-recompute": lambda: Unrolled(recompute=True),
    "unrolled-forward": lambda: Unrolled(hvp=hvp_forward),
    "unrolled-finite": lambda: Unrolled(hvp=hvp_finite()),
    "implicit-cg": lambda: Implicit(CG(10)),
}

TOKENS = {"answer": answer_tokens, "context": context_tokens, "all": all_tokens}


def choice(table: Mapping[str, Any], word: str, option: str) -> Any:
    """Return the object for a word, or raise an error that lists the words.

    Raises:
        DataError: for a word that is not in the table.

    Example:
        >>> choice(MASKS, "diagonal", "--mask")
        Traceback (most recent call last):
        metafocus.errors.DataError: --mask 'diagonal' is unknown: use one of causal, prefix-lm, \
context-bidirectional, full.
    """
    if word not in table:
        raise DataError(f"{option} {word!r} is unknown: use one of {', '.join(table)}.")
    return table[word]
