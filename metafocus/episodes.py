"""Episodes: pairs of support and query, checked and stacked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.errors import ProblemError
from metafocus.torch_internals import pytree
from metafocus.types import Episode


def stack_episodes(episodes: Iterable[Any]) -> Episode:
    """Return many episodes as one, every tensor stacked on a new axis 0: for `mf.over_tasks`.

    Raises:
        ProblemError: for no episodes, or if structures or shapes differ.

    Example:
        >>> one = Episode(torch.zeros(5, 2), torch.ones(3))
        >>> stack_episodes([one, one]).support.shape
        torch.Size([2, 5, 2])
    """
    if isinstance(episodes, Episode):
        raise ProblemError(
            "episodes is one mf.Episode, whose support and query would be stacked on each other: "
            "write mf.stack_episodes([episode])."
        )
    if isinstance(episodes, Tensor) or not isinstance(episodes, Iterable):
        raise ProblemError(
            f"episodes must be a list of mf.Episode, got {type(episodes).__name__}: write "
            "mf.stack_episodes([episode, ...])."
        )
    episodes = list(episodes)
    if not episodes:
        raise ProblemError("episodes is empty: there is nothing to stack.")
    # Plain pairs and mf.Episode have different structures as pytrees.
    whole = [as_episode(e) for e in episodes]
    specs = [pytree.tree_structure(e) for e in whole]
    odd = next((i for i, spec in enumerate(specs) if spec != specs[0]), None)
    if odd is not None:
        raise ProblemError(
            f"episode {odd} has another structure than episode 0: {specs[odd]} and {specs[0]}."
        )
    try:
        return pytree.tree_map(_stacked, *whole)
    except RuntimeError as error:
        raise ProblemError(
            f"episodes cannot be stacked: {error}. Pad every tensor to one shape, or run them one "
            "by one."
        ) from error


def _stacked(*leaves: Any) -> Any:
    if all(isinstance(x, Tensor) for x in leaves):
        return torch.stack(leaves)
    for name in pt.sealed(leaves[0]):
        raise ProblemError(
            f"episodes hold a {name}, which torch does not know as a container, so that its "
            "tensors cannot be stacked. Pass a dict, list, tuple or NamedTuple of them "
            "(`dict(batch)`, `vars(batch)`)."
        )
    if not all(_alike(x, leaves[0]) for x in leaves):
        raise ProblemError(
            f"episodes hold different constants ({leaves[0]!r} in the first): make them tensors."
        )
    return leaves[0]


def _alike(a: Any, b: Any) -> bool:
    if a is b or type(a) is not type(b):
        return a is b
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):
        # Arrays have no single answer.
        return False


def as_episode(value: Any, source: str = "episode") -> Episode:
    """Return a pair as an `Episode`.

    A tensor of two rows or a dict of two entries could be taken apart as well, silently wrong.

    Raises:
        ProblemError: if it is not a tuple or list of two.

    Example:
        >>> as_episode((1, 2))
        Episode(support=1, query=2)
    """
    if isinstance(value, list) and value and all(isinstance(e, Episode) for e in value):
        raise ProblemError(
            f"{source} is a list of {len(value)} episodes: stack them with mf.stack_episodes and "
            "use mf.over_tasks, or take one at a time."
        )
    if not isinstance(value, tuple | list) or len(value) != 2:
        size = f" of {len(value)}" if hasattr(value, "__len__") else ""
        got = type(value).__name__ + size
        verb = "return" if source == "prepare" else "be"
        raise ProblemError(f"{source} must {verb} mf.Episode(support, query), got {got}.")
    return Episode(*value)
