"""Attempts: a call that fails leaves random generators and modes as they were before it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from metafocus.calls.blocks import Scoped
from metafocus.calls.owners import Call, inside
from metafocus.rng import Drawn
from metafocus.torch_internals import modes, pytree

_SAVED: Scoped[dict[torch.Generator, Tensor] | None] = Scoped(None)


@contextlib.contextmanager
def attempt(*given: Any, call: Call | None = None) -> Iterator[None]:
    """Run a call from outside; after an error, generators and modes are as they were before it.

    An attempt inside another one is a part of it.

    Args:
        given: what the call is given; the generators in it, and those of the devices of its
            tensors, are put back.
        call: the call that made a graph, while this graph is differentiated.
    """
    if torch.compiler.is_compiling():
        yield
        return
    leaves = pytree.tree_leaves(given) if given else []
    generators = [x for x in leaves if isinstance(x, torch.Generator)]
    if _SAVED.get() is not None:
        for generator in generators:
            draws_from(generator)
        with inside(call):
            yield
        return
    drawn, put_back = Drawn(x for x in leaves if isinstance(x, Tensor)), modes()
    saved = {generator: generator.get_state() for generator in generators}
    with inside(call), _SAVED.set(saved):
        try:
            yield
        except BaseException:
            put_back()
            drawn.put_back()
            for generator, state in saved.items():
                generator.set_state(state)
            raise


def attempted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function or method whose calls are attempts."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with attempt(args, kwargs):
            return function(*args, **kwargs)

    return run


def draws_from(generator: torch.Generator) -> None:
    """Let the attempt that runs put a generator back after an error; call it before a draw."""
    saved = None if torch.compiler.is_compiling() else _SAVED.get()
    if saved is not None and generator not in saved:
        saved[generator] = generator.get_state()
