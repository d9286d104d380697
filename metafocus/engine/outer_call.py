"""The call from outside in which a meta loss is evaluated, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import reaches_another_leaf
from metafocus.calls import Call, attempt, current
from metafocus.errors import ProblemError
from metafocus.torch_internals import transforming
from metafocus.types import Aux, Params

MetaLoss = Callable[[Params, Any], tuple[Tensor, Aux]]
"""`meta_loss(outer, episode) -> (loss, Aux)`."""

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
