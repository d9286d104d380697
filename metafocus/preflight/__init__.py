"""One trial of a bilevel problem that finds an ill-posed one before it goes wrong.

`arguments` asks what the loss reads and closes over, `writes` what it changes outside, `draws` from
which generators it draws, `kernels` whether its second derivative exists, `own_gradients` what
it does with gradients itself; `trial` runs the loss and one update once for all of them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.grad import refuse_inference_mode
from metafocus.autodiff.safe_operators.swapping import Swapped, differentiable_once
from metafocus.calls import note
from metafocus.errors import ProblemError
from metafocus.preflight.arguments import explained, refuse_hidden, refuse_sealed, unused_by
from metafocus.preflight.kernels import refuse_lost_first_derivatives, trust
from metafocus.preflight.own_gradients import OwnGradients, on_tape_only
from metafocus.preflight.trial import Trial, first_task
from metafocus.rng import kept
from metafocus.torch_internals import outside_transforms, transforming
from metafocus.types import InnerLoss, Params, Solver

__all__ = ["explained", "preflight", "trust", "try_outer_loss"]


def preflight(
    inner_loss: InnerLoss,
    solver: Solver,
    start: Params,
    outer: Params,
    support: Any,
    *,
    explicit: bool = False,
    twice: bool = False,
    redraws: bool | None = None,
) -> InnerLoss:
    """Try the inner loss, its gradient and one update on constants; return the loss to use.

    Random numbers used by the trial are given back, and so is whatever the trial writes to.

    Args:
        inner_loss: `(fast, slow, data) -> scalar`.
        solver: the inner optimiser.
        start: the fast weights before the first step.
        outer: the slow weights.
        support: what the inner loss sees; of a stream, the data of step 0.
        explicit: whether the estimator differentiates explicit tensors only.
        twice: whether the estimator differentiates the gradient of the inner loss.
        redraws: whether the loss is run again for its derivative, and must then draw the same
            random numbers; None: as `explicit`.

    Returns:
        The loss, such that batch norm in training mode leaves its running statistics alone.

    Raises:
        ProblemError: if the loss is not a scalar, asks for a name that it is not given, or does
            not depend on one of the fast weights; if the loss or the solver changes anything in
            place or keeps a state that a forward pass changes; if a second derivative is needed
            and a kernel loses it; with `redraws`, if random numbers come from elsewhere than
            torch's global generators.
        ClosureError: with `explicit`, if the loss or the solver still needs a derivative although
            all arguments are constants: it closes over a tensor that the estimator cannot see.
    """
    refuse_inference_mode()
    streams.refuse_loader(support, "support must be tensors or a stream")
    data = streams.at(support, 0)
    for stream in streams.opaque(support) if explicit else ():
        refuse_hidden(stream, data if stream is support else stream.at(0))
    if explicit:
        refuse_sealed(data)
    at = pt.detach((start, outer, data))
    redraws = explicit if redraws is None else redraws
    trial = Trial(inner_loss, solver, explicit=explicit, twice=twice, redraws=redraws)
    with kept(pt.tensors(at)), torch.enable_grad():
        if transforming():
            trial.in_transforms(*at)
        else:
            trial.on_tape(*at)
    if trial.own.hooked:
        inner_loss = on_tape_only("inner_loss", inner_loss)
    note("preflight", "one evaluation, one gradient and one update on constants: nothing refused")
    if trial.swapped.needed:
        note("preflight", "the loss needs swapped operators even for first derivatives")
        return differentiable_once(inner_loss)
    return inner_loss


def try_outer_loss(outer_loss: InnerLoss, fast: Params, slow: Params, query: Any) -> bool:
    """Raise if an outer loss depends on none of the fast weights, or loses a derivative.

    Args:
        outer_loss: `(fast, slow, query) -> scalar`.
        fast: the fast weights after the inner loop.
        slow: the slow weights.
        query: what the outer loss sees.

    Returns:
        Whether a hook in the loss changes a gradient.

    Raises:
        ProblemError: saying which.
    """
    point, slow = pt.detach(fast), pt.detach(slow)
    if not point:
        return False
    own = OwnGradients()

    def watched(f: Params, slow: Params = slow, query: Any = query) -> Tensor:
        # What counts the batches of batch norm looks at its caller, so it comes first.
        with own, Swapped(once=True):
            return outer_loss(f, slow, query)

    with kept(point.values()):
        unused = unused_by(watched, point)
        if transforming():
            # A transform runs no hooks. A loss that closes over its tensors cannot run outside.
            with suppress(Exception), outside_transforms():
                first, *rest = first_task((point, slow, query))
                unused_by(lambda f: watched(f, *rest), first)
        if own.kernels:
            with outside_transforms(), Swapped(once=True):
                point, slow, query = first_task((point, slow, query))
                refuse_lost_first_derivatives("outer_loss", outer_loss, point, slow, query, own)
    if unused == set(point):
        raise ProblemError(
            f"outer_loss depends on none of the fast weights {sorted(point)}: the inner loop would "
            "change nothing. Use fast in it, as in torch.func.functional_call(net, fast, (x,)); "
            "net(x) sees the weights before the adaptation."
        )
    return own.hooked
