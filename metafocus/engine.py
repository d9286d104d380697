"""The verb: a problem, an inner solver and an estimator become one differentiable function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.grad import leaf_alias, reaches_another_leaf
from metafocus.autodiff.safe_operators.swapping import Swapped
from metafocus.calls import Call, attempt, attempted, current, noting
from metafocus.checks import check_finite, function
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.factories import picklable
from metafocus.path import Path, name_of, path_weights, refuse_path, weighted
from metafocus.preflight import preflight, refuse_ignored_fast_weights
from metafocus.preflight.described import note_parts
from metafocus.preflight.rebuilt import Uses
from metafocus.problem import Problem, check_params, constants, moving, refuse_empty
from metafocus.sharding import local_parts, refuse_bare_ddp, refuse_parts
from metafocus.solvers.descent import solve_inner
from metafocus.torch_internals import transforming
from metafocus.types import Aux, Episode, InnerLoss, Params, Solution, Solver

MetaLoss = Callable[[Params, Any], tuple[Tensor, Aux]]
"""`meta_loss(outer, episode) -> (loss, Aux)`."""


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
    _check_parts(problem, solver, estimator)
    if path is not None:
        refuse_path(estimator, solver)
    explicit = getattr(estimator, "explicit", False)
    twice = getattr(estimator, "twice", True)
    inner_loss: InnerLoss | None = None
    outer_tried = False
    outer_needs = True
    uses = Uses(problem.inner_loss, problem.outer_loss, problem.init, solver, estimator)

    def evaluate(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        nonlocal inner_loss, outer_tried, outer_needs
        check_params(outer, "outer", "outer parameters")
        if explicit:
            refuse_empty(outer, str(estimator), "or use Unrolled() or FirstOrder()")
        given, outer = outer, local_parts(outer)
        support, query = problem.prepared(outer, episode)
        start = problem.start(outer, support)
        refuse_parts(start, given)
        explaining = noting()
        if explaining:
            note_parts(solver, estimator, path, start, outer, support, query)
        first = (inner_loss is None or explaining) and not torch.compiler.is_compiling()
        found = problem.inner_loss if inner_loss is None else inner_loss
        if first:
            if torch.is_grad_enabled():
                refuse_bare_ddp(given)
            found = preflight(
                problem.inner_loss, solver, start, outer, support, explicit=explicit, twice=twice
            )
        args = (found, solver, start, outer, support)
        if path is None:
            solution = estimator(*args)
            _check_solution(solution, start, estimator)
            last = max(solver.steps - 1, 0)
            ends = [(None, solution.params, streams.at(query, last))]
        else:
            weights = path_weights(path, outer, solver.steps)
            with_path: Any = estimator
            solution = with_path(*args, path=tuple(range(solver.steps)))
            _check_solution(solution, start, estimator)
            data = [streams.at(query, step) for step in range(solver.steps)]
            if len(solution.path) != len(data):
                raise ProblemError(
                    f"{name_of(estimator)} was asked for the fast weights after {len(data)} steps "
                    f"and returned a path of {len(solution.path)}."
                )
            ends = list(zip(weights, solution.path, data, strict=True))
        if not transforming():
            check_finite(solution.losses)
        if first:
            inner_loss = found
        # Under no_grad an outer loss may be a metric without a derivative.
        if not outer_tried and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _check_outer(problem, ends[-1], outer)
            outer_tried = True
        if uses.count < 2 and not torch.compiler.is_compiling():
            uses.add()
        # A mode costs at every operator: outside transforms only a loss that needs it has one.
        plain = not outer_needs and not transforming()
        swapped = Swapped(once=True)
        with nullcontext() if plain else swapped:
            loss, metrics = weighted(problem, ends, outer)
        if not plain and not transforming():
            outer_needs = swapped.needed
        return loss, Aux(pt.detach(solution.params), solution.losses.detach(), metrics)

    def meta_loss(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        return outermost(evaluate, outer, episode)

    return meta_loss


META_LOSS = "(outer, episode) -> (loss, aux), such as mf.bilevel returns"
"""What a meta loss is."""

_INSIDE: ContextVar[Call | None] = ContextVar("inside", default=None)
"""The call in which a meta loss is evaluated: what an interrupt leaves here belongs to no other."""


def outermost(evaluate: MetaLoss, outer: Params, episode: Any) -> tuple[Tensor, Any]:
    """Return `evaluate(outer, episode)`; refuse a loss that no gradient can flow from.

    A meta loss inside another one, as with three levels, is not checked.

    Raises:
        ProblemError: with grad mode on and outside transforms, if neither the loss nor anything
            in `outer` or the episode requires grad.
    """
    call = _INSIDE.get()
    if torch.compiler.is_compiling() or (call is not None and call is current()):
        return evaluate(outer, episode)
    with attempt(outer, episode):
        token = _INSIDE.set(current())
        try:
            loss, aux = evaluate(outer, episode)
        finally:
            _INSIDE.reset(token)
    if (
        torch.is_grad_enabled()
        and not transforming()
        and not any(x.requires_grad for x in outer.values())
        and not any(x.requires_grad for x in pt.tensors(episode))
        and not reaches_another_leaf(loss)
    ):
        raise ProblemError(
            "nothing in outer requires grad, so loss.backward() would train nothing (state_dict() "
            "and detached tensors are constants). Pass mf.trainable(model), take the gradient with "
            "mf.hypergrad(meta_loss), or evaluate under torch.no_grad()."
        )
    return loss, aux


def _check_parts(problem: Any, solver: Any, estimator: Any) -> None:
    """Raise unless the three parts are what they should be."""
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"problem must be an mf.Problem(inner_loss, outer_loss), got {type(problem).__name__}."
        )
    _check_solver(solver)
    check_estimator("estimator", estimator)


def check_estimator(name: str, estimator: Any) -> None:
    """Raise unless an estimator can be called as one."""
    _refuse_class(name, estimator, "mf.Unrolled()")
    form = "(inner_loss, solver, start, outer, support) -> mf.Solution, such as mf.Unrolled()"
    function(name, estimator, form, 5)


def _refuse_class(name: str, part: Any, example: str) -> None:
    if isinstance(part, type):
        raise ProblemError(
            f"{name} must be an object, got the class {part.__name__}: write {example}."
        )


def _check_solver(solver: Any) -> None:
    _refuse_class("solver", solver, "mf.SGD(0.1, steps=5)")
    if not all(hasattr(solver, name) for name in ("steps", "init", "update")):
        raise ProblemError(
            "solver must have steps, init and update, as mf.SGD(0.1, steps=5) has, got "
            f"{type(solver).__name__}. Optimisers of torch.optim work in place and cannot be "
            "differentiated; mf.SGD, mf.Adam, mf.AdamW, mf.Muon have their formulas."
        )


def _check_solution(solution: Any, start: Params, estimator: Any) -> None:
    """Raise unless an estimator returned a solution with every fast weight."""
    name = name_of(estimator)
    if not isinstance(solution, Solution):
        raise ProblemError(
            f"{name} must return mf.Solution(params, losses), got {type(solution).__name__}."
        )
    if not isinstance(solution.params, dict) or set(solution.params) != set(start):
        got = sorted(solution.params) if isinstance(solution.params, dict) else solution.params
        raise ProblemError(
            f"{name} must return every fast weight that the start holds, {sorted(start)}, got "
            f"{got}."
        )
    if not isinstance(solution.losses, Tensor):
        raise ProblemError(
            f"{name} must return the inner losses of mf.Solution as a tensor, got "
            f"{type(solution.losses).__name__}: torch.stack(losses)."
        )
    if torch.is_grad_enabled() and not transforming():
        _refuse_constant(solution.params, start, name)


def _refuse_constant(params: Params, start: Params, name: str) -> None:
    """Raise for fast weights without a graph where the start has one."""
    tracked = any(v.requires_grad for v in start.values())
    if tracked and not any(v.requires_grad for v in params.values()):
        raise ProblemError(
            f"{name} returned constants: no derivative flows through its fast weights, and the "
            "hypergradient would be zero. mf.solve_inner returns constants; tie them to the start "
            "as mf.FirstOrder does, v + (start[k] - start[k].detach()), or combine estimators."
        )


def _check_outer(problem: Problem, end: tuple[Any, Params, Any], outer: Params) -> None:
    _, fast, query = end
    refuse_ignored_fast_weights(lambda f: problem.evaluate(f, pt.detach(outer), query)[0], fast)


@picklable
def hypergrad(meta_loss: MetaLoss) -> Callable[[Params, Any], tuple[Params, tuple[Tensor, Aux]]]:
    """Return `(outer, episode) -> (hypergradient, (loss, aux))`.

    Equal to `torch.func.grad` of the loss with auxiliary output, also in that the result can be
    differentiated again where `outer` requires grad or a transform is active. Outside transforms
    it rides on the tape, which is faster.

    Args:
        meta_loss: `(outer, episode) -> (loss, Aux)`, of `bilevel`, `over_tasks`, `Evolution` or
            any function of this form.

    Returns:
        A function whose hypergradient has the names and shapes of `outer`; `outer` itself is
        left alone, and so is its `.grad`.

    Raises:
        ProblemError: at the call, if `outer` is not a dict of floating-point tensors, and what
            `meta_loss` raises.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.FirstOrder())
        >>> episode = mf.Episode(torch.tensor([0.0]), torch.tensor([0.0]))
        >>> grads, (value, aux) = mf.hypergrad(meta)({"w": torch.tensor([1.0])}, episode)
        >>> grads["w"]
        tensor([1.6000])
    """
    function("meta_loss", meta_loss, META_LOSS)

    @attempted
    def value_and_hypergrad(outer: Params, episode: Any) -> tuple[Params, tuple[Tensor, Aux]]:
        check_params(outer, "outer", "outer parameters")
        free = moving(outer)

        def at(point: Params) -> tuple[Tensor, Aux]:
            return meta_loss({k: point.get(k, v) for k, v in outer.items()}, episode)

        if transforming():
            grads, (loss, aux) = torch.func.grad_and_value(at, has_aux=True)(free)
        else:
            grads, loss, aux = _on_tape(at, free)
        return {k: grads[k] if k in grads else torch.zeros_like(v) for k, v in outer.items()}, (
            loss,
            aux,
        )

    return value_and_hypergrad


def _on_tape(
    meta_loss: Callable[[Params], tuple[Tensor, Aux]], outer: Params
) -> tuple[Params, Tensor, Aux]:
    track = torch.is_grad_enabled() and any(v.requires_grad for v in outer.values())
    with torch.enable_grad():
        leaves = {k: leaf_alias(v, track) for k, v in outer.items()}
        loss, aux = meta_loss(dict(leaves))
        if not loss.requires_grad or not leaves:
            return pt.zeros_like(pt.detach(leaves)), loss if track else loss.detach(), aux
        grads = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=track, materialize_grads=True
        )
    return dict(zip(leaves, grads, strict=True)), loss if track else loss.detach(), aux


@attempted
def adapt(
    problem: Problem, outer: Params, support: Any, *, solver: Solver, path: Sequence[int] = ()
) -> Solution:
    """Run the inner loop for evaluation: adapted fast weights without any outer graph.

    Args:
        problem: the bilevel problem; its outer loss is not used.
        outer: the outer parameters.
        support: what the inner loss sees, or a stream of it.
        solver: the inner optimiser.
        path: numbers of the inner steps, from 0, after which the fast weights are wanted too, in
            `Solution.path`.

    Raises:
        ProblemError: as `bilevel` does.
        NonFiniteError: if an inner loss is NaN or infinite (always checked outside `vmap`).

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> w = {"w": torch.tensor([1.0])}
        >>> mf.adapt(maml, w, torch.tensor([0.0]), solver=mf.SGD(0.1, steps=2)).losses
        tensor([1.0000, 0.6400])
    """
    _check_solver(solver)
    check_params(outer, "outer", "outer parameters")
    if isinstance(support, Episode):
        raise ProblemError(
            "support must be the data of the inner loss, got an mf.Episode: pass episode.support."
        )
    outer = constants(local_parts(outer))
    support = pt.detach(problem.prepared(outer, Episode(support, support)).support)
    start, inner_loss = problem.start(outer, support), problem.inner_loss
    if not transforming():
        inner_loss = preflight(inner_loss, solver, start, outer, support)
    solution = solve_inner(inner_loss, solver, start, outer, support, path)
    if not transforming():
        check_finite(solution.losses)
    return solution
