"""Functions that other functions make, so that they can be pickled: as the call that made them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

Given = ParamSpec("Given")
Result = TypeVar("Result")


def picklable(factory: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return a factory whose functions the standard library pickles, for another process.

    A function inside a function cannot be pickled. Here the arguments of the factory are pickled
    instead, and the copy is made anew from them: it holds nothing that the original has learned
    since, such as which checks it has passed.

    Args:
        factory: a function at the top of a module that returns a function.

    Example:
        >>> import pickle
        >>> from metafocus.problem import proximal
        >>> from metafocus.recipes.fewshot import sinusoids
        >>> proximal(sinusoids, 2.0)
        proximal(sinusoids, 2.0)
        >>> pickle.loads(pickle.dumps(proximal(sinusoids, 2.0)))
        proximal(sinusoids, 2.0)
    """

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        return Made(cast(Any, factory)(*args, **kwargs), make, args, kwargs)

    return cast(Any, make)


class Made:
    """A function, and the call that made it.

    Args:
        run: the function.
        make: the factory, as it stands in its module.
        args: what the factory was given.
        kwargs: what it was given by name.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        make: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self.run: Callable[..., Any] = run
        self.make: Callable[..., Any] = make
        self.args: tuple[Any, ...] = args
        self.kwargs: dict[str, Any] = kwargs
        self.__signature__: inspect.Signature = inspect.signature(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.run(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _again, (self.make, self.args, self.kwargs)

    def __hash__(self) -> int:
        # What one factory makes is of one kind: `preflight.rebuilt` counts it.
        return hash(self.make)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        given = [*map(_short, self.args), *(f"{k}={_short(v)}" for k, v in self.kwargs.items())]
        return f"{self.make.__name__}({', '.join(given)})"


def _again(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return make(*args, **kwargs)


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
