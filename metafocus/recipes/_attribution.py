"""Which training examples helped: the metagradient of a training run, and how to check it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import stores
from metafocus.checks import function, positive
from metafocus.comparison.smooth import Smoothness, smoothness
from metafocus.errors import NotSmoothWarning, NotStationaryWarning, ProblemError
from metafocus.estimators import Implicit, Unrolled
from metafocus.linear import CG
from metafocus.preflight import preflight
from metafocus.problem import Problem, check_params
from metafocus.solvers import Given, solve_inner
from metafocus.streams import Batches, PerStep, Zipped, zipped
from metafocus.types import Episode, Estimator, LinearSolver, Params, Solver

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
            with these weights of the examples. A process pool can run it if `losses`, the data
            set and the solver pickle.
        trust: the report of `mf.smoothness` on the run, if `directions` was set.
    """

    scores: Tensor
    losses: Tensor
    params: Params
    retrained: Callable[[Tensor], Tensor]
    trust: Smoothness | None = None


@dataclass(frozen=True, eq=False)
class Retraining:
    """A training run on weighted examples; it can be pickled if its losses and its data set can.

    Attributes:
        losses: the loss of each example of a batch.
        start: the weights that training starts from.
        train: the batches, with the numbers of their rows.
        solver: the optimiser of the run.
        query_losses: the loss of each query.
        query: the data of `query_losses`.
        at_once: how many runs `vmap` maps; None: all. With 1 nothing is mapped.
    """

    losses: Losses
    start: Params
    train: Batches
    solver: Solver
    query_losses: Losses
    query: Any
    at_once: int | None

    def inner(self, fast: Params, slow: Params, data: Any) -> Tensor:
        """Return the weighted mean loss of a batch, given as `(batch, weights)`."""
        batch, weight = data
        return (weight * _each(self.losses(fast, batch), weight)).mean()

    def rows(self) -> int:
        """Return how many rows the data set has."""
        assert self.train.rows is not None
        return int(self.train.rows.max()) + 1 if self.train.size is None else self.train.size

    def stream(self, weight: Tensor) -> Zipped:
        """Return the batches with the weights of their rows."""
        assert self.train.rows is not None
        return zipped(self.train, PerStep(weight[self.train.rows]))

    def __call__(self, weights: Tensor) -> Tensor:
        """Return the losses `[runs, queries]` after training with weights `[runs, rows]`."""
        least = self.rows()
        if not isinstance(weights, Tensor) or weights.ndim != 2 or weights.shape[1] != least:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ProblemError(
                f"weights must be a tensor [runs, {least}], one row for each run and one weight "
                f"for each row of the data, got {got}. For a single run: weights[None]."
            )
        if self.at_once == 1:
            return torch.stack([self._one(weight) for weight in weights])
        return torch.func.vmap(self._one, chunk_size=self.at_once)(weights)

    def _one(self, weight: Tensor) -> Tensor:
        fast = solve_inner(self.inner, self.solver, self.start, {}, self.stream(weight)).params
        return self.query_losses(fast, self.query).detach()


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
    directions: int = 0,
) -> Attribution:
    """Return the derivative of query losses by the weight of each training example: MAGIC.

    The run starts from `start()`, and `solver` takes steps on `mean_i weight_i loss_i` of each
    batch, where all weights are one. It takes one forward pass, and one backward pass for all
    queries.

    Args:
        losses: the loss of each example of a batch.
        start: returns the weights that training starts from; called once.
        train: the batches, with the numbers of their rows (`mf.Batches.from_dataset`).
        query: the data of `query_losses`.
        solver: the optimiser of the run; a decay of the weights belongs to it.
        query_losses: the loss of each query; None: `losses`.
        estimator: how to differentiate the run; None: exactly, by `Unrolled` with all states on
            the device. For long runs `mf.Unrolled(store=mf.stores.schedule(12))`.
        queries_at_once: how many queries share a backward pass (their cotangents are a batch that
            `vmap` maps); None: all. With 1 nothing is mapped.
        runs_at_once: how many runs `retrained` maps by `vmap`; None: all. With 1 it maps none.
        directions: along how many random directions `mf.smoothness` tries the run, with four to
            eight runs each; 0: it does not.

    Raises:
        ProblemError: if `train` does not know its rows, or `losses` or `query_losses` returns
            anything but one value for each.
        NotSmoothWarning: if the run was tried and its metagradient cannot be trusted.

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
    function("losses", losses, "(params, batch) -> [rows]", 2)
    function("start", start, "() -> params, such as lambda: weights", 0)
    first = start()
    check_params(first, "start()", "weights")
    like = next(iter(first.values()))
    asked = losses if query_losses is None else query_losses
    training = Retraining(losses, pt.detach(first), train, solver, asked, query, runs_at_once)
    inner, stream = training.inner, training.stream

    weight = like.new_ones(training.rows()).requires_grad_()
    with torch.enable_grad():
        how = Unrolled(store=stores.device()) if estimator is None else estimator
        data, slow = stream(weight), {"weight": weight}
        ready = preflight(inner, solver, first, slow, data, explicit=True, twice=True)
        solution = how(ready, solver, pt.detach(first), slow, data)
        if not any(v.requires_grad for v in solution.params.values()):
            raise ProblemError(
                f"estimator {how} passes no derivative by the weights of the examples, so there "
                "are no scores. Leave estimator out, or pass mf.Unrolled(...)."
            )
        # The queries one by one, which costs no more; their way through the run together.
        ends = {k: v.detach().requires_grad_() for k, v in solution.params.items()}
        found = _of_queries(asked(ends, query))
        each = [_gradient(value, ends) for value in found]
        at_end = [torch.stack(row) for row in zip(*each, strict=True)]
        scores = _through(solution.params, at_end, weight, queries_at_once)
    trust = None
    if directions:
        problem = Problem(
            inner,
            lambda fast, slow, data: asked(fast, data).mean(),
            lambda slow, support: first,
            lambda slow, episode: Episode(stream(slow["weight"]), episode.query),
        )
        trust = smoothness(
            problem,
            slow,
            Episode(train, query),
            solver=solver,
            directions=directions,
            estimator=how,
            generator=torch.Generator().manual_seed(0),
        )
        if trust.verdict != "trustworthy":
            warnings.warn(
                f"the scores may not predict what other weights do: {trust}. Smoother runs have "
                "smaller rates, smooth activations and no batch norm.",
                NotSmoothWarning,
                stacklevel=2,
            )
    return Attribution(scores, found.detach(), pt.detach(solution.params), training, trust)


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
    uses the end of the run only, and not the steps that led to it.

    Args:
        losses: the loss of each example.
        params: the trained weights.
        data: all training examples, row by row.
        query: the data of `query_losses`.
        query_losses: the loss of each query; None: `losses`.
        damping: strength of the quadratic that makes the Hessian invertible; a decay of the
            weights belongs to it.
        solve: the linear solver.

    Raises:
        ValueError: if `damping` is not positive.
        ProblemError: if `query_losses` returns anything but one value for each query.

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
            found = [
                torch.autograd.grad(value, weight, retain_graph=True)[0]
                for value in _of_queries(asked(solution.params, query))
            ]
    return torch.stack(found)


def _each(losses: Tensor, weight: Tensor) -> Tensor:
    if losses.shape != weight.shape:
        raise ProblemError(
            f"losses must return one value for each of the {weight.shape[0]} rows of a batch, got "
            f"shape {list(losses.shape)}."
        )
    return losses


def _of_queries(losses: Tensor) -> Tensor:
    if losses.ndim != 1:
        raise ProblemError(
            "query_losses (or losses, if it is None) must return one value for each query, got "
            f"shape {list(losses.shape)}."
        )
    return losses


def _gradient(value: Tensor, at: Params) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, list(at.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _through(
    params: Params, cotangents: list[Tensor], weight: Tensor, at_once: int | None
) -> Tensor:
    """Return the derivative by the weights for each row of cotangents, `[queries, rows]`."""

    def one(*given: Tensor) -> Tensor:
        ends = list(params.values())
        return torch.autograd.grad(ends, weight, list(given), retain_graph=True)[0]

    if at_once == 1:
        return torch.stack([one(*row) for row in zip(*cotangents, strict=True)])
    return torch.func.vmap(one, chunk_size=at_once)(*cotangents)
