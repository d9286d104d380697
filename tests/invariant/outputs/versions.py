"""One spelling for both versions of the interface, before and after the redesign of the contract.

This is the only file of `before_after.py` that looks which version it has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import metafocus as mf

NEW = hasattr(mf, "from_slow")

Params = dict[str, Any]


def problem(inner: Any, outer: Any, start: Callable[[Params], Params] | None = None) -> mf.Problem:
    """A problem that starts at `start(slow)`; None: at the slow weights themselves."""
    if not NEW:
        return mf.Problem(inner, outer, init=start or (lambda slow: slow))
    if start is None:
        return mf.Problem(inner, outer)
    return mf.Problem(inner, outer, lambda slow, support: start(slow))


def chosen(before: str, after: str) -> Any:
    """A module that had another name."""
    return importlib.import_module(f"metafocus.{after if NEW else before}")


if NEW:
    algorithms: Any = mf.algorithms
else:
    algorithms = SimpleNamespace(
        **{k: getattr(mf, k) for k in ("SOBA", "SABA", "StocBiO", "AmIGO", "BOME", "F2SA")},
        **{k: getattr(mf, k) for k in ("Windows", "PES", "ESSingle")},
        Evolution=mf.evolution,
        draw=mf.single_loop.draw,
    )


def trainer() -> Any:
    """The module of `FocusTrainer` and `FocusArguments`; transformers' Trainer is slow to load."""
    return chosen("integrations.hf", "trainer")


def stdlib_qa() -> Any:
    """The generator of chats about Python's own documentation."""
    return chosen("stdlib_qa", "data.stdlib_qa")


def tokenizer() -> Any:
    """The module that trains the embedded tokenizer."""
    return chosen("tokenizer", "data.tokenizer")
