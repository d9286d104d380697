"""Few-shot learning: sinusoid tasks, and the methods of the literature as problems.

Each function returns the problem of a method. With the solver and the estimator of this table it is
the method of its paper:

| method | problem | solver | estimator |
|---|---|---|---|
| MAML (arXiv 1703.03400) | `maml(loss)` | `SGD(0.01, steps=1)` | `Unrolled()` |
| first-order MAML (the same) | `maml(loss)` | the same | `FirstOrder()` |
| ANIL (arXiv 1909.09157) | `anil(loss, head)` | the same | `Unrolled()` |
| Meta-SGD (arXiv 1707.09835) | `meta_sgd(loss)` | `SGD(learned_rates, steps=1)` | `Unrolled()` |
| iMAML (arXiv 1909.04630) | `imaml(loss, 2.0)` | `SGD(lr, steps=16)` | `Implicit(CG(5))` |
| Reptile (arXiv 1803.02999) | `reptile(loss)` | `SGD(lr, steps=5)` | `FirstOrder()` |

`loss(params, data)` is the loss of a network with all its parameters, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import whole
from metafocus.errors import ProblemError
from metafocus.factories import picklable
from metafocus.problem import Problem, from_slow, proximal
from metafocus.recipes._parts import Loss, of_fast
from metafocus.types import Aux, Episode, InnerLoss, Params

RATE = "lr."
"""The prefix of the names of learned rates."""


def sinusoids(
    tasks: int,
    shots: int,
    queries: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> Episode:
    """Draw sinusoid regression tasks, stacked on axis 0 (MAML, section 5.1).

    `y = a sin(x - p)` with `a ~ U[0.1, 5]` and `p ~ U[0, pi]`, drawn for each task, and
    `x ~ U[-5, 5]`, drawn for each point. Every call draws new tasks.

    Args:
        tasks: the number of tasks.
        shots: the number of points of each task that the inner loop sees.
        queries: the number of further points of each task, for the outer loss.
        generator: the source of all random numbers; on the CPU.
        dtype: the type of the data. None: torch's default.

    Returns:
        `Episode((x, y), (x, y))` with shapes `[tasks, shots, 1]` and `[tasks, queries, 1]`.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> episodes = sinusoids(25, shots=10, queries=5, generator=torch.Generator())
        >>> episodes.query[0].shape
        torch.Size([25, 5, 1])
    """
    for name, value in (("tasks", tasks), ("shots", shots), ("queries", queries)):
        whole(name, value, 1)

    def uniform(low: float, high: float, count: int) -> Tensor:
        unit = torch.rand(tasks, count, 1, generator=generator, dtype=dtype)
        return low + (high - low) * unit

    amplitude, phase = uniform(0.1, 5.0, 1), uniform(0.0, math.pi, 1)
    support, query = uniform(-5.0, 5.0, shots), uniform(-5.0, 5.0, queries)
    return Episode(*((x, amplitude * torch.sin(x - phase)) for x in (support, query)))


def maml(loss: Loss) -> Problem:
    """Return MAML's problem: all weights adapt, and their start is learned.

    The estimator `Unrolled()` makes it exact, and `FirstOrder()` makes it first-order MAML. With
    `steps=0` it is plain training on the queries of all tasks, the baseline of the paper.

    Example:
        >>> import metafocus as mf
        >>> problem = maml(lambda params, data: ((params["w"] * data[0] - data[1]) ** 2).mean())
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.01, steps=1), estimator=mf.Unrolled())
        >>> meta = mf.over_tasks(meta)
        >>> episodes = sinusoids(25, 10, 10, generator=torch.Generator())
        >>> grads, (value, aux) = mf.hypergrad(meta)({"w": torch.zeros(1)}, episodes)
        >>> aux.params["w"].shape
        torch.Size([25, 1])
    """
    adapted = of_fast(loss)
    return Problem(adapted, adapted)


def anil(loss: Loss, head: Sequence[str]) -> Problem:
    """Return ANIL's problem: only the head adapts, and all weights are learned.

    Args:
        loss: a function of all parameters.
        head: the names of those that adapt. In the paper: weight and bias of the last layer.

    Raises:
        ValueError: if the head is empty.
        ProblemError: at the call, if `outer` does not hold one of the names.
    """
    if not head or isinstance(head, str):
        raise ValueError(f"head must be a tuple of parameter names, got {head!r}.")

    whole = _whole(loss)
    return Problem(whole, whole, _head(head))


@picklable
def _whole(loss: Loss) -> InnerLoss:
    return lambda fast, slow, data: loss(slow | fast, data)


@picklable
def _head(head: Sequence[str]) -> Callable[[Params, Any], Params]:
    def start(slow: Params, support: Any) -> Params:
        missing = sorted(set(head) - set(slow))
        if missing:
            raise ProblemError(f"head names {missing[0]!r}; outer holds {sorted(slow)}.")
        return {k: slow[k] for k in head}

    return start


def meta_sgd(loss: Loss) -> Problem:
    """Return Meta-SGD's problem: the start and a rate for each weight are learned.

    The outer parameters are `with_rates(weights, lr)`, and the solver is
    `SGD(learned_rates, steps=1)`. As in the paper, rates may become negative.

    Example:
        >>> import metafocus as mf
        >>> problem = meta_sgd(lambda params, data: (params["w"] - data) ** 2)
        >>> solver = mf.SGD(learned_rates, steps=1)
        >>> meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled())
        >>> outer, one = with_rates({"w": torch.tensor(0.0)}, 0.25), torch.tensor(1.0)
        >>> mf.hypergrad(meta)(outer, mf.Episode(one, one))[0]
        {'w': tensor(-0.5000), 'lr.w': tensor(-2.)}
    """
    adapted = of_fast(loss)
    return Problem(adapted, adapted, _without_rates)


def _without_rates(slow: Params, support: Any) -> Params:
    if not any(k.startswith(RATE) for k in slow):
        raise ProblemError("outer holds no rates. Pass with_rates(weights, lr).")
    return {k: v for k, v in slow.items() if not k.startswith(RATE)}


def with_rates(weights: Params, lr: float) -> Params:
    """Return the weights, and one rate for each of their entries under `lr.<name>`."""
    return weights | {RATE + k: torch.full_like(v, lr) for k, v in weights.items()}


def learned_rates(outer: Params) -> Params:
    """Return the rates that `with_rates` added: the `lr` of a solver."""
    return {k.removeprefix(RATE): v for k, v in outer.items() if k.startswith(RATE)}


def imaml(loss: Loss, strength: float = 2.0) -> Problem:
    """Return iMAML's problem: all weights adapt but stay near their start, which is learned.

    The inner loss is `loss + strength / 2 |fast - slow|^2`. With `Implicit(CG(5))` the inner
    steps leave no graph, so many steps cost no more memory than few.

    Raises:
        ValueError: if the strength is negative.
    """
    adapted = of_fast(loss)
    return Problem(proximal(adapted, strength), adapted)


def reptile(loss: Loss) -> Problem:
    """Return Reptile's problem, whose hypergradient is `slow - fast`.

    Reptile has an outer direction, `slow <- slow + rate (fast - slow)`, but no outer loss with
    this derivative. The loss of this problem is `|slow - fast|^2 / 2` with the adapted weights
    held constant, whose derivative is `slow - fast` (arXiv 1803.02999, section 5.2: the distance
    to the solutions of the task). Its value shows how far adaptation moves, not how good it is,
    and it does not depend on the query. `torch.optim.SGD` with learning rate `rate` then takes
    the step of the paper; over tasks it is the mean, as in the paper's batched form. Use `maml`,
    which has the same start, to evaluate.

    All estimators give the same result, because nothing is differentiated through the inner loop.
    `FirstOrder()` is the cheapest.

    Example:
        >>> import metafocus as mf
        >>> problem = reptile(lambda params, data: (params["w"] - data) ** 2)
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.25, steps=2), estimator=mf.FirstOrder())
        >>> grads, (_, aux) = mf.hypergrad(meta)(
        ...     {"w": torch.tensor(0.0)}, mf.Episode(torch.tensor(1.0), None))
        >>> aux.params, grads
        ({'w': tensor(0.7500)}, {'w': tensor(-0.7500)})
    """
    return Problem(of_fast(loss), _distance, _detached)


def _distance(fast: Params, slow: Params, _: Any) -> Tensor:
    return torch.stack([((slow[k] - v) ** 2).sum() for k, v in fast.items()]).sum() / 2


def _detached(slow: Params, support: Any) -> Params:
    return pt.detach(from_slow(slow, support))


def diverging(aux: Aux) -> Tensor:
    """Return for which tasks the last inner loss is above the first one, or not finite.

    The last inner loss is the one before the last step.

    Args:
        aux: the auxiliary output for one episode, or of `over_tasks`.

    Returns:
        Booleans, `[]` or `[tasks]`. With fewer than two inner steps all of them are False.

    Example:
        >>> diverging(Aux({}, torch.tensor([[2.0, 1.0], [2.0, 9.0], [2.0, torch.nan]])))
        tensor([False,  True,  True])
    """
    losses = aux.inner_losses
    if not losses.shape[-1]:
        return torch.zeros(losses.shape[:-1], dtype=torch.bool, device=losses.device)
    return ~(losses[..., -1] <= losses[..., 0])
