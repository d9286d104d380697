"""The verb: a problem, an inner solver and an estimator become one differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metafocus.checks import function
from metafocus.engine.checked_parts import check_parts
from metafocus.engine.evaluating import Evaluation
from metafocus.engine.outer_call import MetaLoss, outermost
from metafocus.estimators import Estimator
from metafocus.factories import picklable
from metafocus.path import Path, refuse_path
from metafocus.problem import Problem
from metafocus.types import Aux, Params, Solution, Solver


@picklable
def bilevel(
    problem: Problem,
    *,
    solver: Solver,
    estimator: Estimator | Callable[..., Solution],
    path: Path | None = None,
) -> MetaLoss:
    """Return the outer loss after adaptation, whose derivative is the chosen hypergradient.

    `meta_loss(outer, episode) = outer_loss(estimator(...), outer, episode.query)`: an ordinary
    scalar function of the outer parameters, for `loss.backward()`, `torch.func.grad`, `vmap` and
    their compositions. With `path`, `sum_t path[t] outer_loss(fast_(t+1), outer, query)` over the
    fast weights after every inner step (the multi-step loss of MAML++, arXiv 1810.09502).

    Args:
        problem: the losses of both levels and the start.
        solver: the inner optimiser.
        estimator: how the adapted fast weights depend on the outer parameters.
        path: weights `[steps]` of the outer loss after each inner step: a tensor, a sequence, or
            a function of `outer` (learned weights). They are used as they are, neither normalised
            nor pruned. None: the outer loss after the last step alone. Memory grows by one set of
            fast weights a step.

    Returns:
        `meta_loss(outer, episode) -> (loss, Aux)`. `outer` is a flat dict of floating-point
        tensors (`mf.trainable(model)`); `{}` means the parameters that the losses close over, for
        estimators that ride on the tape. `Aux` is detached; its metrics are those after the last
        step.

    Raises:
        ProblemError: at the first call, for losses that are not scalars, keys that do not fit,
            integer outer parameters, or an empty `outer` where explicit tensors are needed; for a
            `path` of another length than the steps, or an estimator that cannot give one.
        ClosureError: at the first call, if the estimator would miss a closed-over tensor.
        NonFiniteError: at any call outside transforms, if an inner loss is NaN or infinite.
        RebuiltWarning: if meta losses of the same parts are built again and again, and each is
            evaluated once: the checks of the first call then run each time.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
        >>> w = {"w": torch.tensor([1.0], requires_grad=True)}
        >>> value, aux = meta(w, mf.Episode(torch.tensor([0.0]), torch.tensor([0.0])))
        >>> value.backward()
        >>> w["w"].grad
        tensor([1.2800])
    """
    check_parts(problem, solver, estimator)
    if path is not None:
        refuse_path(estimator, solver)
        if callable(path):
            function("path", path, "outer -> weights of the inner steps", 1)
    evaluate = Evaluation(problem, solver, estimator, path)

    def meta_loss(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        return outermost(evaluate, outer, episode)

    return meta_loss
