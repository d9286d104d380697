"""Hyper-parameters: regularisation, weights of data and data themselves, learned by validation.

A problem each; the support is what is trained on, the query what is validated on. The solver is
whatever trains the model (`mf.Given` for a closed form). The estimator is `Implicit(CG(n))` where
training converges (arXiv 1911.02590, 2006.16218) and `Unrolled(last=k, recompute=True)` where it
does not; the single-loop methods (`mf.algorithms.SOBA` and its family) take the same problems.

`start()` returns the weights that training starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus.checks import not_negative
from metafocus.errors import ProblemError
from metafocus.problem import Problem
from metafocus.types import Params

Loss = Callable[[Params, Any], Tensor]
"""`(params, data) -> scalar`."""

Losses = Callable[[Params, Any], Tensor]
"""`(params, data) -> [n]`, the loss of each sample."""

Start = Callable[[], Params]

PREFIX = "log_l2."


def log_l2(loss: Loss, start: Start) -> Problem:
    """Learn how strongly each weight is decayed.

    Inner: `loss + 1/2 sum_k sum exp(log_l2_k) w_k^2`; outer: `loss`. With as many penalties as
    weights a small validation set is overfitted (arXiv 1911.02590, section 5.1).

    Args:
        loss: of the weights.
        start: the weights that training starts from.

    Returns:
        A problem whose outer parameters are `log_l2.<name>` for some of the weights, of any shape
        that broadcasts against the weight: one for all, for each column, for each entry.

    Raises:
        ProblemError: at the call, for a penalty without a weight, or of a larger shape.

    Example:
        >>> import metafocus as mf
        >>> def loss(w, y):
        ...     return ((w["w"] - y) ** 2).sum() / 2
        >>> problem = log_l2(loss, lambda: {"w": torch.ones(1)})
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.5, 60), estimator=mf.Implicit(mf.CG(1)))
        >>> data = mf.Episode(torch.tensor([1.0]), torch.tensor([0.5]))
        >>> loss, aux = meta({"log_l2.w": torch.tensor(0.0)}, data)
        >>> aux.params
        {'w': tensor([0.5000])}
    """

    def penalised(fast: Params, slow: Params, data: Any) -> Tensor:
        value = loss(fast, data)
        for name, penalty in _penalties(fast, slow).items():
            value = value + (penalty.exp() * fast[name] ** 2).sum() / 2
        return value

    return Problem(penalised, lambda fast, slow, data: loss(fast, data), lambda _, support: start())


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
    """Learn how much each group of training data counts, from clean validation data.

    Inner: `mean_i sigmoid(weight[group_i]) loss_i + l2/2 |w|^2`; outer: the mean loss. With a
    group for each sample this finds wrong labels; with one for each source it mixes data.

    Args:
        losses: one for each sample.
        start: the weights that training starts from.
        l2: strength of a penalty on all weights, which keeps the inner problem well-posed where
            data alone do not.

    Returns:
        A problem with the outer parameter `weight`, `[groups]`, in logits. The support is
        `(group, data)` with integers `[n]`; the query is `data`.

    Raises:
        ValueError: for a negative `l2`.
        ProblemError: at the call, if `weight` is missing or `losses` are not one for each group.

    Example:
        >>> import metafocus as mf
        >>> problem = reweight(lambda w, y: (w["w"] - y) ** 2 / 2, lambda: {"w": torch.zeros(())})
        >>> support = (torch.tensor([0, 1]), torch.tensor([1.0, 5.0]))
        >>> meta = mf.bilevel(problem, solver=mf.SGD(1.0, 60), estimator=mf.Implicit(mf.CG(1)))
        >>> outer = {"weight": torch.zeros(2)}
        >>> grads, _ = mf.hypergrad(meta)(outer, mf.Episode(support, torch.tensor([1.0])))
        >>> grads["weight"].sign()  # the first sample agrees with validation
        tensor([-1.,  1.])
    """
    not_negative("l2", l2)

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

    return Problem(
        weighted, lambda fast, slow, data: losses(fast, data).mean(), lambda _, support: start()
    )


def distill(loss: Loss, start: Start, labels: Any) -> Problem:
    """Learn a few training examples that teach what a whole data set does.

    Inner: `loss` on `(slow["x"], labels)`; outer: `loss` on the real data, the query. The support
    is not used. (arXiv 1811.10959; at scale by implicit differentiation, arXiv 1911.02590.)

    Args:
        loss: of `(x, labels)`.
        start: the weights that training starts from.
        labels: of the learned examples.

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
    return Problem(
        lambda fast, slow, _: loss(fast, (slow["x"], labels)),
        lambda fast, slow, data: loss(fast, data),
        lambda _, support: start(),
    )
