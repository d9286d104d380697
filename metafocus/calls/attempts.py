"""Attempts: a call that fails leaves random generators and modes as they were before it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.calls.blocks import Block, Scoped, with_block
from metafocus.calls.owners import Call, enter, inside
from metafocus.rng import Drawn
from metafocus.torch_internals import leave_modes, mode_state

_SAVED: Scoped[dict[torch.Generator, Tensor] | None] = Scoped(None)


def attempt(
    *given: Any, generators: Sequence[torch.Generator] = (), call: Call | None = None
) -> contextlib.AbstractContextManager[Any]:
    """Run a call from outside; after an error, generators and modes are as they were before it.

    An attempt inside another one is a part of it.

    Args:
        given: what the call is given; the random state of its tensors' devices is put back.
        generators: further ones that it draws from.
        call: the call that made a graph, while this graph is differentiated.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if _SAVED.get() is None:
        return _attempt(given, generators, call)
    for generator in generators:
        draws_from(generator)
    return inside(call)


@with_block
def _attempt(
    given: Any, generators: Sequence[torch.Generator], call: Call | None, *, block: Block
) -> Iterator[None]:
    # Every call of the engine comes here: without CUDA it is not worth looking for devices.
    cuda = torch.cuda.is_initialized()
    drawn = Drawn(pt.tensors(given) if cuda else ())
    kinds = ("cpu", "cuda") if cuda else ("cpu",)
    modes = _modes(kinds)
    saved = {generator: generator.get_state() for generator in generators} if generators else {}
    leave, end = enter(call, block), _SAVED.begin(saved, block)
    try:
        yield
    except BaseException:
        _put_back(kinds, modes)
        drawn.put_back()
        for generator, state in saved.items():
            generator.set_state(state)
        raise
    finally:
        end()
        leave()


def attempted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function or method whose calls are attempts."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        generators = [x for x in given if isinstance(x, torch.Generator)]
        with attempt(given, generators=generators):
            return function(*args, **kwargs)

    return run


def draws_from(generator: torch.Generator) -> None:
    """Let the attempt that runs put a generator back after an error; call it before a draw."""
    saved = None if torch.compiler.is_compiling() else _SAVED.get()
    if saved is not None and generator not in saved:
        saved[generator] = generator.get_state()


def _modes(kinds: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the modes of this thread: those of operators, gradients, and autocast."""
    torch.autocast_increment_nesting()
    return (
        mode_state(),
        torch.is_grad_enabled(),
        torch.autocast_decrement_nesting(),
        torch.is_autocast_cache_enabled(),
        *[(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
    )


def _put_back(kinds: tuple[str, ...], modes: tuple[Any, ...]) -> None:
    """Put the modes of this thread back, as far as they are left set.

    An interrupt at the end of a `with` block leaves the mode that the block has set.
    """
    if _modes(kinds) == modes:
        return
    operators, grad, nesting, cache, *casts = modes
    leave_modes(operators)
    torch.set_grad_enabled(grad)
    torch.autocast_increment_nesting()
    while torch.autocast_decrement_nesting() > nesting:
        pass
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(cache)
    for kind, (enabled, dtype) in zip(kinds, casts, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
