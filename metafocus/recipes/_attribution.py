"""Which training examples helped: the metagradient of a training run, and how to check it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import stores
from metafocus.checks import fraction, positive, seeded, whole
from metafocus.errors import NotStationaryWarning, ProblemError
from metafocus.estimators import Implicit, Unrolled
from metafocus.linear import CG
from metafocus.preflight import preflight
from metafocus.solvers import Given, solve_inner
from metafocus.streams import Batches, PerStep, Zipped, zipped
from metafocus.types import Estimator, LinearSolver, Params, Solver

Losses = Callable[[Params, Any], Tensor]
"""`(params, data) -> [n]`, the loss of each example."""


@dataclass(frozen=True)
class Attribution:
    """What a training run says about its examples.

    Attributes:
        scores: `[queries, rows]`, the derivative of each query's loss by the weight of each
            example. Negative: the example helped, more of it lowers the loss.
        losses: `[queries]`, the loss of each query after training.
        params: the trained weights.
        retrained: `(weights [runs, rows]) -> [runs, queries]`, the losses after training anew
            with these weights of the examples.
    """

    scores: Tensor
    losses: Tensor
    params: Params
    retrained: Callable[[Tensor], Tensor]


def attribution(
    losses: Losses,
    start: Callable[[], Params],
    train: Batches,
    query: Any,
    *,
    solver: Solver,
    query_losses: Losses | None = None,
    estimator: Estimator | None = None,
    queries_at_once: int | None = None,
    runs_at_once: int | None = None,
) -> Attribution:
    """Return the derivative of query losses by the weight of each training example: MAGIC.

    The run is `solver` on `mean_i weight_i loss_i` of each batch, from `start()`, with all weights
    one. One forward pass, and one backward pass for all queries.

    Args:
        losses: the loss of each example of a batch.
        start: returns the weights that training starts from; called once.
        train: the batches, with the numbers of their rows (`mf.Batches.from_dataset`).
        query: what `query_losses` is given.
        solver: the optimiser of the run; a decay of the weights belongs to it.
        query_losses: the loss of each query; None: `losses`.
        estimator: how to differentiate the run; None: exactly, by `Unrolled` with all states on
            the device. For long runs `mf.Unrolled(store=mf.stores.schedule(12))`.
        queries_at_once: how many queries share a backward pass (their cotangents are a batch that
            `vmap` maps); None: all. With 1 nothing is mapped.
        runs_at_once: how many runs `retrained` maps by `vmap`; None: all. With 1 nothing is.

    Raises:
        ProblemError: if `train` does not know its rows, or `losses` returns no value for each.

    Example:
        >>> rows = [{"x": torch.tensor(float(i))} for i in range(4)]
        >>> train = Batches.from_dataset(
        ...     rows, batch_size=2, steps=6, generator=torch.Generator().manual_seed(0))
        >>> import metafocus as mf
        >>> found = attribution(
        ...     lambda p, batch: (p["w"] - batch["x"]) ** 2, lambda: {"w": torch.zeros(())},
        ...     train, {"x": torch.tensor([3.0])}, solver=mf.SGD(0.1, steps=6))
        >>> found.scores.argmin().item()  # the row that is most like the query
        3

    References:
        Ilyas and Engstrom, MAGIC: near-optimal data attribution, arXiv 2504.16430.
    """
    if not isinstance(train, Batches) or train.rows is None:
        raise ProblemError(
            f"train must know the rows of its batches, got {type(train).__name__}. Use "
            "mf.Batches.from_dataset, or mf.Batches(fetch, steps, rows)."
        )
    rows, first = train.rows, start()
    size, like = int(rows.max()) + 1, next(iter(first.values()))
    asked = losses if query_losses is None else query_losses

    def inner(fast: Params, slow: Params, data: Any) -> Tensor:
        batch, weight = data
        return (weight * _each(losses(fast, batch), weight)).mean()

    def stream(weight: Tensor) -> Zipped:
        return zipped(train, PerStep(weight[rows]))

    def retrained(weights: Tensor) -> Tensor:
        def one(weight: Tensor) -> Tensor:
            fast = solve_inner(inner, solver, pt.detach(first), {}, stream(weight)).params
            return asked(fast, query).detach()

        if runs_at_once == 1:
            return torch.stack([one(weight) for weight in weights])
        return torch.func.vmap(one, chunk_size=runs_at_once)(weights)

    weight = like.new_ones(size).requires_grad_()
    with torch.enable_grad():
        how = Unrolled(store=stores.device()) if estimator is None else estimator
        data, slow = stream(weight), {"weight": weight}
        ready = preflight(inner, solver, first, slow, data, explicit=True, twice=True)
        solution = how(ready, solver, pt.detach(first), slow, data)
        found = asked(solution.params, query)
        scores = _rows_of_jacobian(found, weight, queries_at_once)
    return Attribution(scores, found.detach(), pt.detach(solution.params), retrained)


def influence(
    losses: Losses,
    params: Params,
    data: Any,
    query: Any,
    *,
    query_losses: Losses | None = None,
    damping: float,
    solve: LinearSolver = CG(100),  # noqa: B008 - frozen, so it can be shared
) -> Tensor:
    """Return the influence function of trained weights, `[queries, rows]`: the usual baseline.

    `-grad q' (H + damping)^-1 grad l_i / n` with `H` the Hessian of the mean loss of all rows. It
    knows the end of the run and nothing of its way there.

    Args:
        losses: the loss of each example.
        params: the trained weights.
        data: all training examples, row by row.
        query: what `query_losses` is given.
        query_losses: the loss of each query; None: `losses`.
        damping: strength of the quadratic that makes the Hessian invertible; a decay of the
            weights belongs to it.
        solve: the linear solver.

    Raises:
        ValueError: if `damping` is not positive.

    References:
        Koh and Liang, arXiv 1703.04730.
    """
    positive("damping", damping)
    centre, asked = pt.detach(params), losses if query_losses is None else query_losses

    def inner(fast: Params, slow: Params, data: Any) -> Tensor:
        near = pt.sub(fast, centre)
        return (slow["weight"] * losses(fast, data)).mean() + damping / 2 * pt.dot(near, near)

    with torch.no_grad():
        weight = torch.ones_like(losses(centre, data)).requires_grad_()
    with torch.enable_grad():
        given: Any = Given(lambda slow, support: centre)
        solution = Implicit(solve)(inner, given, centre, {"weight": weight}, data)
        # A linear solver looks at its residual, which a map over queries would forbid. That the
        # run did not end at a minimum is the known weakness of this baseline.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotStationaryWarning)
            return _rows_of_jacobian(asked(solution.params, query), weight, 1)


class Score(NamedTuple):
    """How well scores predict what training without some examples does.

    Attributes:
        each: `[queries]`, Spearman's correlation of predicted and true losses over the subsets.
        predicted: `[subsets, queries]`, sums of scores of the examples that were kept.
        found: `[subsets, queries]`, losses after training on them.
    """

    each: Tensor
    predicted: Tensor
    found: Tensor

    @property
    def mean(self) -> float:
        """The mean over queries: the linear datamodeling score."""
        return self.each.mean().item()


def linear_datamodeling_score(
    scores: Tensor,
    retrained: Callable[[Tensor], Tensor],
    *,
    subsets: int = 60,
    drop: float = 0.05,
    generator: torch.Generator,
    executor: Executor | None = None,
) -> Score:
    """Return how well scores rank the losses of runs without random subsets of the examples.

    Args:
        scores: `[queries, rows]`, such as `Attribution.scores`.
        retrained: `(weights [runs, rows]) -> [runs, queries]`, such as `Attribution.retrained`.
        subsets: how many runs.
        drop: the share of examples left out of each, at random.
        generator: draws the subsets.
        executor: runs the subsets one by one, such as a process pool or submitit's; None: here,
            all in one call.

    Raises:
        ValueError: for fewer than two subsets, or a `drop` outside of [0, 1).

    Example:
        >>> scores = torch.tensor([[-3.0, -2.0, 1.0, 0.0]])
        >>> result = linear_datamodeling_score(
        ...     scores, lambda weights: (weights @ scores.T) ** 3, subsets=9, drop=0.5,
        ...     generator=torch.Generator().manual_seed(0))
        >>> round(result.mean, 6)
        1.0

    References:
        Park et al., TRAK, arXiv 2303.14186, section 2.
    """
    whole("subsets", subsets, 2)
    fraction("drop", drop)
    seeded(generator)
    rows = scores.shape[1]
    weights = scores.new_ones(subsets, rows)
    for weight in weights:
        weight[torch.randperm(rows, generator=generator)[: round(drop * rows)]] = 0
    if executor is None:
        found = retrained(weights)
    else:
        found = torch.cat(list(executor.map(retrained, weights.split(1))))
    predicted = weights @ scores.T
    each = [spearman(a, b) for a, b in zip(predicted.T, found.T, strict=True)]
    return Score(torch.stack(each), predicted, found)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation of two vectors; equal values share their mean rank.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 6.0])).item()
        1.0
    """
    return torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1]


def _ranks(x: Tensor) -> Tensor:
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[group]


def _each(losses: Tensor, weight: Tensor) -> Tensor:
    if losses.shape != weight.shape:
        raise ProblemError(
            f"losses must return one value for each of the {weight.shape[0]} rows of a batch, got "
            f"shape {list(losses.shape)}."
        )
    return losses


def _rows_of_jacobian(losses: Tensor, weight: Tensor, at_once: int | None) -> Tensor:
    """Return the derivative of each loss by the weights, `[queries, rows]`."""
    found = []
    cotangents = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    for chunk in cotangents.split(at_once or len(losses)):
        batched = len(chunk) > 1
        given = chunk if batched else chunk[0]
        (rows,) = torch.autograd.grad(
            losses, weight, given, retain_graph=True, is_grads_batched=batched
        )
        found.append(rows if batched else rows[None])
    return torch.cat(found)
