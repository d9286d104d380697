"""The verb: a problem, an inner solver and an estimator become one differentiable function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from metafocus import tree
from metafocus.autodiff.backends import scalar
from metafocus.autodiff.composites import Swapped
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.levels import transforming
from metafocus.probe import probe
from metafocus.problem import Problem, check_finite, check_params
from metafocus.solvers.descent import solve_inner
from metafocus.types import Aux, Episode, Params, Solution, Solver

MetaLoss = Callable[[Params, Any], tuple[Tensor, Aux]]
"""`meta_loss(outer, episode) -> (loss, Aux)`."""


def bilevel(problem: Problem, *, solver: Solver, estimator: Estimator) -> MetaLoss:
    """Return the outer loss after adaptation, whose derivative is the chosen hypergradient.

    `meta_loss(outer, episode) = outer_loss(estimator(...), outer, episode.query)`: an ordinary
    scalar function of the outer parameters, for `loss.backward()`, `torch.func.grad`, `vmap` and
    their compositions.

    Args:
        problem: the losses of both levels and the start.
        solver: the inner optimiser.
        estimator: how the adapted fast weights depend on the outer parameters.

    Returns:
        `meta_loss(outer, episode) -> (loss, Aux)`. `outer` is a flat dict of floating-point
        tensors; `{}` means the parameters that the losses close over, for estimators that ride
        on the tape. `Aux` is detached.

    Raises:
        ProblemError: at the first call, for losses that are not scalars, keys that do not fit,
            integer outer parameters, or an empty `outer` where explicit tensors are needed.
        ClosureError: at the first call, if the estimator would miss a closed-over tensor.
        NonFiniteError: at any call outside transforms, if an inner loss is NaN or infinite.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss, init=lambda slow: slow)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
        >>> w = {"w": torch.tensor([1.0], requires_grad=True)}
        >>> value, aux = meta(w, mf.Episode(torch.tensor([0.0]), torch.tensor([0.0])))
        >>> value.backward()
        >>> w["w"].grad
        tensor([1.2800])
    """
    probed = False

    def meta_loss(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        nonlocal probed
        check_params(outer, "outer", "outer parameters")
        explicit = getattr(estimator, "explicit", False)
        if explicit and not outer:
            raise ProblemError(
                f"outer={{}} with {estimator}: this estimator differentiates explicit tensors "
                "only. Pass dict(model.named_parameters()) as outer (never state_dict(): tied "
                "names clash), or use Unrolled() or FirstOrder()."
            )
        support, query = problem.prepared(outer, episode)
        current = problem
        if not probed and not torch.compiler.is_compiling():
            current = probe(problem, solver, outer, support, explicit=explicit)
            probed = True
        solution = estimator(current, solver, outer, support)
        if not transforming():
            check_finite(solution.losses)
        with Swapped(once=True):
            value = problem.outer_loss(solution.params, outer, query)
        loss = scalar(value, "outer_loss")
        return loss, Aux(tree.detach(solution.params), solution.losses.detach())

    return meta_loss


def hypergrad(meta_loss: MetaLoss) -> Callable[[Params, Any], tuple[Params, tuple[Tensor, Aux]]]:
    """Return `(outer, episode) -> (hypergradient, (loss, aux))`.

    Equal to `torch.func.grad` of the loss with auxiliary output, also in that the result can be
    differentiated again where `outer` requires grad or a transform is active. Outside transforms
    it rides on the tape, which is faster.

    Args:
        meta_loss: `(outer, episode) -> (loss, Aux)`, of `bilevel`, `over_tasks`, `evolution` or
            any function of this form.

    Returns:
        A function whose hypergradient has the names and shapes of `outer`; `outer` itself is
        left alone, and so is its `.grad`.

    Raises:
        ProblemError: at the call, if `outer` is no dict of floating-point tensors, and what
            `meta_loss` raises.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss, init=lambda slow: slow)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.FirstOrder())
        >>> episode = mf.Episode(torch.tensor([0.0]), torch.tensor([0.0]))
        >>> grads, (value, aux) = mf.hypergrad(meta)({"w": torch.tensor([1.0])}, episode)
        >>> grads["w"]
        tensor([1.6000])
    """

    def value_and_hypergrad(outer: Params, episode: Any) -> tuple[Params, tuple[Tensor, Aux]]:
        check_params(outer, "outer", "outer parameters")
        if transforming():
            grads, (loss, aux) = torch.func.grad_and_value(meta_loss, has_aux=True)(outer, episode)
            return grads, (loss, aux)
        track = torch.is_grad_enabled() and any(v.requires_grad for v in outer.values())
        with torch.enable_grad():
            leaves = {
                k: v.view_as(v) if track and v.requires_grad else v.detach().requires_grad_()
                for k, v in outer.items()
            }
            if track or not hasattr(meta_loss, "pieces"):
                grads, loss, aux = _differentiated(lambda x: meta_loss(x, episode), leaves, track)
            else:
                grads, loss, aux = _piecewise(cast(Separable, meta_loss), leaves, episode)
        return grads, (loss if track else loss.detach(), aux)

    return value_and_hypergrad


class Separable(Protocol):
    """A meta loss that is a sum: each term can be differentiated and forgotten by itself."""

    def pieces(self, episodes: Any) -> Sequence[Callable[[Params], tuple[Tensor, Aux]]]:
        """Return functions of the outer parameters whose losses add up to the meta loss."""
        ...

    def join(self, aux: list[Aux]) -> Aux:
        """Return the auxiliary outputs of all pieces as those of the whole."""
        ...


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of scalars."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()


def _piecewise(whole: Separable, leaves: Params, episodes: Any) -> tuple[Params, Tensor, Aux]:
    total, losses, auxiliary = None, [], []
    for piece in whole.pieces(episodes):
        grads, loss, aux = _differentiated(piece, leaves, track=False)
        losses.append(loss.detach())
        auxiliary.append(aux)
        total = grads if total is None else tree.add(total, grads)
    assert total is not None
    return total, sum_of(losses), whole.join(auxiliary)


def _differentiated(
    fn: Callable[[Params], tuple[Tensor, Aux]], leaves: Params, track: bool
) -> tuple[Params, Tensor, Aux]:
    """Return gradient, value and auxiliary output of a function of leaves of the tape."""
    loss, aux = fn(leaves)
    if not loss.requires_grad or not leaves:
        return tree.zeros_like(tree.detach(leaves)), loss, aux
    grads = torch.autograd.grad(
        loss, list(leaves.values()), create_graph=track, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True)), loss, aux


def adapt(problem: Problem, outer: Params, support: Any, *, solver: Solver) -> Solution:
    """Run the inner loop for evaluation: adapted fast weights without any outer graph.

    Args:
        problem: the bilevel problem; its outer loss is not used.
        outer: the outer parameters.
        support: what the inner loss sees.
        solver: the inner optimiser.

    Raises:
        ProblemError: as `bilevel` does.
        NonFiniteError: if an inner loss is NaN or infinite (always checked outside `vmap`).

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss, init=lambda slow: slow)
        >>> w = {"w": torch.tensor([1.0])}
        >>> mf.adapt(maml, w, torch.tensor([0.0]), solver=mf.SGD(0.1, steps=2)).losses
        tensor([1.0000, 0.6400])
    """
    check_params(outer, "outer", "outer parameters")
    outer = tree.detach(outer)
    support = tree.detach(problem.prepared(outer, Episode(support, support)).support)
    if not transforming():
        problem = probe(problem, solver, outer, support, explicit=False)
    solution = solve_inner(problem.inner_loss, solver, problem.start(outer), outer, support)
    if not transforming():
        check_finite(solution.losses)
    return solution
