"""Random numbers that a rebuild could not draw again: of generators besides torch's global ones."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from metafocus.calls import undone
from metafocus.errors import ProblemError
from metafocus.torch_internals import TorchDispatchMode, generator_key


@contextlib.contextmanager
def refused_draws(who: str, *, explicit: bool) -> Iterator[None]:
    """Put the generators back that are drawn from inside a `with` block, after it.

    Args:
        who: what runs inside, for the message.
        explicit: whether it is run again for its derivative, and must then draw the same numbers.

    Raises:
        ProblemError: with `explicit`, if other generators were drawn from than torch's global ones.
    """
    with Draws() as draws, undone(draws.put_back):
        yield
        source = draws.source()
    if explicit and source is not None:
        raise ProblemError(
            f"{who} draws random numbers from {source}. This estimator runs it again for its "
            "derivative, and would then draw others: only torch's global generators are replayed. "
            "Leave generator= out and call torch.manual_seed(0) before, pass the numbers in the "
            "episode, or use Unrolled() or FirstOrder(), which run it once."
        )


class Draws(TorchDispatchMode):
    """Records which generators operators draw from, and their states before."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self.python: Any = random.getstate()
        self.numpy: Any = _numpy_state()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Generator) and not _is_global(x):
                self.states.setdefault(generator_key(x), (x, x.get_state()))
        return func(*args, **kwargs)

    def source(self) -> str | None:
        """Return which generators were used; None if only torch's global ones were."""
        if self.states:
            return "a generator of its own (generator=...)"
        if random.getstate() != self.python:
            return "Python's module random"
        same = all(map(_equal, _numpy_state() or (), self.numpy or ()))
        return None if same else "numpy"

    def put_back(self) -> None:
        """Let all generators draw what they would have drawn."""
        for generator, state in self.states.values():
            generator.set_state(state)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _is_global(generator: torch.Generator) -> bool:
    known = (torch.default_generator, *torch.cuda.default_generators)
    return generator_key(generator) in map(generator_key, known)


def _equal(a: Any, b: Any) -> bool:
    return bytes(a) == bytes(b) if hasattr(a, "tobytes") else a == b


def _numpy_state() -> Any:
    # A loss that draws from numpy has imported it.
    numpy: Any = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()
