"""The hypergradient of a meta loss, on the tape or by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import leaf_alias
from metafocus.calls import attempted
from metafocus.checks import function, scalar
from metafocus.engine.outer_call import META_LOSS, MetaLoss
from metafocus.factories import picklable
from metafocus.problem import check_params, moving
from metafocus.torch_internals import transforming
from metafocus.types import Aux, Params


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
    function("meta_loss", meta_loss, META_LOSS, 2)

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
        scalar(loss, "meta_loss")
        if not loss.requires_grad or not leaves:
            return pt.zeros_like(pt.detach(leaves)), loss if track else loss.detach(), aux
        grads = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=track, materialize_grads=True
        )
    return dict(zip(leaves, grads, strict=True)), loss if track else loss.detach(), aux
