"""Hyper-parameters: regularisation, weights of data and data themselves, learned by validation.

Each function returns a problem. The support is the training data, and the query is the validation
data. The solver is the optimiser that trains the model (`mf.Given` for a closed form). As estimator
use `Implicit(CG(n))` if training converges (arXiv 1911.02590, 2006.16218), and
`Unrolled(last=k, recompute=True)` if it does not. The single-loop methods (`mf.algorithms.SOBA` and
others) take the same problems.

`start()` returns the weights that training starts from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus.checks import not_negative
from metafocus.errors import ProblemError
from metafocus.factories import picklable
from metafocus.problem import Problem
from metafocus.recipes._parts import Loss, Losses, Start, mean_of, of_fast, started
from metafocus.types import InnerLoss, Params

PREFIX = "log_l2."


def log_l2(loss: Loss, start: Start) -> Problem:
    """Learn how strongly each weight is decayed.

    The inner loss is `loss + 1/2 sum_k sum exp(log_l2_k) w_k^2`, and the outer loss is `loss`.
    One penalty per weight overfits a small validation set (arXiv 1911.02590, section 5.1).

    Args:
        loss: a function of the weights and the data.
        start: returns the weights that training starts from.

    Returns:
        A problem whose outer parameters are `log_l2.<name>` for some of the weights. Each has a
        shape that broadcasts to its weight: one penalty for the tensor, or one for each column,
        or one for each entry.

    Raises:
        ProblemError: at the call, if a penalty has no weight or a larger shape.

    Example:
        >>> import metafocus as mf
        >>> def loss(w, y):
        ...     return ((w["w"] - y) ** 2).sum() / 2
        >>> problem = log_l2(loss, lambda: {"w": torch.ones(1)})
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.5, 60), estimator=mf.Implicit(mf.CG(1)))
        >>> data = mf.Episode(torch.tensor([1.0]), torch.tensor([0.5]))
        >>> outer = {"log_l2.w": torch.tensor(0.0, requires_grad=True)}
        >>> loss, aux = meta(outer, data)
        >>> aux.params
        {'w': tensor([0.5000])}
    """
    return Problem(_penalised(loss), of_fast(loss), started(start))


@picklable
def _penalised(loss: Loss) -> InnerLoss:
    def inner_loss(fast: Params, slow: Params, data: Any) -> Tensor:
        value = loss(fast, data)
        for name, penalty in _penalties(fast, slow).items():
            value = value + (penalty.exp() * fast[name] ** 2).sum() / 2
        return value

    return inner_loss


def _penalties(fast: Params, slow: Params) -> Params:
    found = {k.removeprefix(PREFIX): v for k, v in slow.items() if k.startswith(PREFIX)}
    odd = sorted(set(found) - set(fast))
    if odd or not found:
        raise ProblemError(
            f"outer holds {sorted(slow)}; penalties are named {PREFIX}<name> after the weights "
            f"{sorted(fast)}."
        )
    for name, penalty in found.items():
        try:
            penalty.expand(fast[name].shape)
        except RuntimeError as error:
            raise ProblemError(
                f"{PREFIX}{name} of shape {list(penalty.shape)} does not broadcast to its weight "
                f"of shape {list(fast[name].shape)}."
            ) from error
    return found


def reweight(losses: Losses, start: Start, l2: float = 0.0) -> Problem:
    """Learn a weight for each group of training data, from clean validation data.

    The inner loss is `mean_i sigmoid(weight[group_i]) loss_i + l2/2 |w|^2`, and the outer loss is
    the mean loss. With one group for each sample this finds wrong labels. With one group for each
    source it learns a mixture of sources.

    Args:
        losses: returns one loss for each sample.
        start: returns the weights that training starts from.
        l2: strength of a penalty on all weights. It keeps the inner problem well-posed if the
            data alone do not.

    Returns:
        A problem with the outer parameter `weight`, `[groups]`, in logits. The support is
        `(group, data)` with integers `group` of shape `[n]`. The query is `data`.

    Raises:
        ValueError: if `l2` is negative.
        ProblemError: at the call, if `weight` is missing, or if `losses` does not return one
            value for each entry of `group`.

    Example:
        >>> import metafocus as mf
        >>> problem = reweight(lambda w, y: (w["w"] - y) ** 2 / 2, lambda: {"w": torch.zeros(())})
        >>> support = (torch.tensor([0, 1]), torch.tensor([1.0, 5.0]))
        >>> meta = mf.bilevel(problem, solver=mf.SGD(1.0, 60), estimator=mf.Implicit(mf.CG(1)))
        >>> outer = {"weight": torch.zeros(2)}
        >>> grads, _ = mf.hypergrad(meta)(outer, mf.Episode(support, torch.tensor([1.0])))
        >>> grads["weight"].sign()  # the first sample agrees with the validation data
        tensor([-1.,  1.])
    """
    not_negative("l2", l2)
    return Problem(_reweighted(losses, l2), mean_of(losses), started(start))


@picklable
def _reweighted(losses: Losses, l2: float) -> InnerLoss:
    def weighted(fast: Params, slow: Params, support: Any) -> Tensor:
        if "weight" not in slow:
            raise ProblemError(f'outer must hold "weight", a logit for each group; {sorted(slow)}.')
        group, data = support
        each = losses(fast, data)
        if each.shape != group.shape:
            raise ProblemError(
                f"losses must return one value for each of the groups {list(group.shape)}, got "
                f"shape {list(each.shape)}."
            )
        value = (slow["weight"].sigmoid()[group] * each).mean()
        if l2:
            value = value + l2 / 2 * torch.stack([(v**2).sum() for v in fast.values()]).sum()
        return value

    return weighted


def distill(loss: Loss, start: Start, labels: Any) -> Problem:
    """Learn a few training examples that replace a whole data set.

    The inner loss is `loss` on `(slow["x"], labels)`. The outer loss is `loss` on the real data,
    the query. The support is not used. (arXiv 1811.10959; at scale by implicit differentiation,
    arXiv 1911.02590.)

    Args:
        loss: a function of the weights and `(x, labels)`.
        start: returns the weights that training starts from.
        labels: the labels of the learned examples.

    Returns:
        A problem with the outer parameter `x`, the learned examples.

    Example:
        >>> import metafocus as mf
        >>> def loss(w, data):
        ...     return ((data[0] @ w["w"] - data[1]) ** 2).mean()
        >>> problem = distill(loss, lambda: {"w": torch.zeros(2)}, torch.tensor([1.0]))
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps=5), estimator=mf.Unrolled())
        >>> real = torch.eye(2), torch.tensor([2.0, 0.0])
        >>> grads, _ = mf.hypergrad(meta)({"x": torch.ones(1, 2)}, mf.Episode(None, real))
        >>> grads["x"].sign()
        tensor([[-1.,  1.]])
    """
    return Problem(_on_examples(loss, labels), of_fast(loss), started(start))


@picklable
def _on_examples(loss: Loss, labels: Any) -> InnerLoss:
    return lambda fast, slow, _: loss(fast, (slow["x"], labels))
