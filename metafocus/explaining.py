"""The verb `explain`: what a meta loss does with its arguments, in words."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from metafocus.calls import attempt, noting_into
from metafocus.checks import function
from metafocus.engine import META_LOSS, MetaLoss, hypergrad
from metafocus.types import Params

WIDTH = 100
TOPICS = (
    "tasks",
    "estimator",
    "inner solver",
    "path",
    "fast weights",
    "outer parameters",
    "support",
    "query",
    "shared layers",
    "attention",
    "operators",
    "custom kernels",
    "preflight",
    "hypergradient",
)
"""What notes are written about, in the order in which they are printed."""


@dataclass(frozen=True)
class Explanation:
    """What one call of a meta loss does; `print` it.

    Attributes:
        topics: lines of text by topic: tasks, estimator, inner solver, fast weights, support,
            operators (those that are replaced in the losses), preflight, hypergradient, ...

    Example:
        >>> print(Explanation({"inner solver": ("SGD(lr=0.1, steps=1)",)}))
        inner solver  SGD(lr=0.1, steps=1)
    """

    topics: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        width = max(map(len, self.topics), default=0) + 2
        blocks = []
        for topic, lines in self.topics.items():
            for i, line in enumerate(lines):
                head = "" if i else topic
                wrapped = textwrap.wrap(
                    line, WIDTH, initial_indent=f"{head:<{width}}", subsequent_indent=" " * width
                )
                blocks.append("\n".join(wrapped))
        return "\n".join(blocks)


class _Explained(Exception):
    """Ends the attempt in which a meta loss is explained, so that draws are given back."""


def explain(meta_loss: MetaLoss, outer: Params, episode: Any) -> Explanation:
    """Return what a meta loss does with these arguments, in words.

    The hypergradient is computed once, with the checks of a first call, also where they were made
    before. Nothing changes: neither `.grad` nor a random generator.

    Args:
        meta_loss: `(outer, episode) -> (loss, Aux)`: of `bilevel`, `over_tasks`, a recipe, or any
            function around them.
        outer: the outer parameters, as the meta loss takes them.
        episode: support and query.

    Raises:
        MetafocusError: what the meta loss raises for these arguments.

    Example:
        >>> import metafocus as mf, torch
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.FirstOrder())
        >>> x = torch.zeros(3)
        >>> found = mf.explain(meta, {"w": torch.ones(3)}, mf.Episode(x, x))
        >>> found.topics["hypergradient"]
        ('not zero in 1 of 1 outer parameters',)
    """
    function("meta_loss", meta_loss, META_LOSS, 2)
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    gradient: Params = {}
    try:
        # An attempt that fails puts every generator back as it was: this one always fails.
        with attempt(outer, episode), noting_into(found):
            gradient = hypergrad(meta_loss)(outer, episode)[0]
            raise _Explained
    except _Explained:
        pass
    if gradient:
        zero = [name for name, value in gradient.items() if not value.any()]
        line = f"not zero in {len(gradient) - len(zero)} of {len(gradient)} outer parameters"
        found["hypergradient"] = [f"{line}; zero in {', '.join(zero)}" if zero else line]
    found["operators"] = found["operators"] or ["none is replaced"]
    return Explanation({topic: tuple(lines) for topic, lines in found.items() if lines})
