"""Weights of data, distilled data and generated starts, learned through whole training runs.

Most functions return a problem, which is the part that differs from method to method. The solver is
the optimiser of the run, and the estimator says how the run is differentiated, such as
`mf.Unrolled(store=mf.stores.schedule(12))`; `mf.algorithms.Windows` takes a problem in windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import stores
from metafocus.engine import MetaLoss, bilevel
from metafocus.estimators import Unrolled
from metafocus.factories import picklable
from metafocus.problem import Problem
from metafocus.recipes._parts import Loss, Losses, Start, mean_of, started
from metafocus.recipes.hpo import distill as distilled
from metafocus.solvers import SGD, per_step
from metafocus.types import Estimator, InnerLoss, Params


def weights(
    losses: Losses, start: Start, weigh: Callable[[Params, Any, Tensor], Tensor]
) -> Problem:
    """Learn what weight an example of a batch gets, from its data or from its loss.

    The inner loss is `mean_i weight_i loss_i`, and the outer loss is the mean loss.

    Args:
        losses: returns the loss of each example.
        start: returns the weights that training starts from.
        weigh: `(slow, batch, losses) -> [n]`: a small network of the losses (Meta-Weight-Net), or
            a table of free weights, `lambda slow, batch, _: slow["weight"][batch["index"]]`.
            The derivative of the inner loss includes that of a weight by its loss; the paper
            leaves it out, and its update is then not the gradient of any loss.

    Example:
        >>> import torch, metafocus as mf
        >>> def loss(fast, batch):
        ...     return (fast["w"] - batch["y"]) ** 2
        >>> def net(slow, batch, losses):
        ...     return torch.sigmoid(slow["bias"] + slow["slope"] * losses)
        >>> problem = weights(loss, lambda: {"w": torch.zeros(())}, net)
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.05, 20), estimator=mf.Unrolled())
        >>> slow = {"bias": torch.tensor(0.0), "slope": torch.tensor(0.0)}
        >>> noisy, clean = {"y": torch.tensor([1.0, 9.0])}, {"y": torch.tensor([1.0])}
        >>> mf.hypergrad(meta)(slow, mf.Episode(noisy, clean))[0]["slope"].sign()
        tensor(1.)

    References:
        Shu et al., Meta-Weight-Net, arXiv 1902.07379.
    """
    return Problem(_weighted(losses, weigh), mean_of(losses), started(start))


@picklable
def _weighted(losses: Losses, weigh: Callable[[Params, Any, Tensor], Tensor]) -> InnerLoss:
    def weighted(fast: Params, slow: Params, batch: Any) -> Tensor:
        each = losses(fast, batch)
        return (weigh(slow, batch, each) * each).mean()

    return weighted


def datarater(losses: Losses, start: Start, rate: Callable[[Params, Any], Tensor]) -> Problem:
    """Learn to rate examples, so that training on the well-rated ones gives a better model.

    The inner loss is `sum_i softmax(rating)_i loss_i` over a batch, and the outer loss is the
    mean loss of held-out data.

    Args:
        losses: returns the loss of each example.
        start: returns the weights that training starts from.
        rate: `(slow, batch) -> [n]`: a network of the examples, or a table of free ratings.

    Example:
        >>> import torch, metafocus as mf
        >>> problem = datarater(
        ...     lambda fast, batch: (fast["w"] - batch["y"]) ** 2, lambda: {"w": torch.zeros(())},
        ...     lambda slow, batch: slow["by_source"][batch["source"]])
        >>> data = {"y": torch.tensor([1.0, 9.0]), "source": torch.tensor([0, 1])}
        >>> meta = mf.bilevel(problem, solver=mf.Adam(0.1, 60), estimator=mf.Unrolled())
        >>> slow = {"by_source": torch.zeros(2)}
        >>> episode = mf.Episode(data, {"y": torch.tensor([1.0])})
        >>> mf.hypergrad(meta)(slow, episode)[0]["by_source"].sign()
        tensor([-1.,  1.])

    References:
        Calian et al., DataRater: meta-learned dataset curation, arXiv 2505.17895.
    """
    return Problem(_rated(losses, rate), mean_of(losses), started(start))


@picklable
def _rated(losses: Losses, rate: Callable[[Params, Any], Tensor]) -> InnerLoss:
    def rated(fast: Params, slow: Params, batch: Any) -> Tensor:
        return (rate(slow, batch).softmax(0) * losses(fast, batch)).sum()

    return rated


def distill(
    loss: Loss, start: Start, labels: Any, *, steps: int, estimator: Estimator | None = None
) -> MetaLoss:
    """Learn a few training examples and the rate of each step, by training on them.

    Args:
        loss: a function of the weights and `(x, labels)`.
        start: returns the weights that training starts from; it may draw new ones at each call.
        labels: the labels of the learned examples.
        steps: how many steps of SGD are taken on the learned examples.
        estimator: default `Unrolled(store=mf.stores.segments())`.

    Returns:
        `meta_loss(outer, Episode(None, data)) -> (loss, Aux)` with the outer parameters `x`, the
        learned examples, and `log_lr`, `[steps]`.

    Example:
        >>> import torch
        >>> def loss(w, data):
        ...     return ((data[0] @ w["w"] - data[1]) ** 2).mean()
        >>> meta = distill(loss, lambda: {"w": torch.zeros(2)}, torch.tensor([1.0]), steps=100)
        >>> outer = {"x": torch.ones(1, 2), "log_lr": torch.full((100,), -3.0)}
        >>> import metafocus as mf
        >>> real = torch.eye(2), torch.tensor([2.0, 0.0])
        >>> mf.hypergrad(meta)(outer, mf.Episode(None, real))[0]["x"].sign()
        tensor([[-1.,  1.]])

    References:
        Wang et al., Dataset distillation, arXiv 1811.10959.
    """
    return bilevel(
        distilled(loss, start, labels),
        solver=SGD(per_step(_learned_rate), steps),
        estimator=Unrolled(store=stores.segments()) if estimator is None else estimator,
    )


def _learned_rate(slow: Params, step: int) -> Tensor:
    return slow["log_lr"][step].exp()


def generated(
    problem: Problem, generate: Callable[[Params, Any], Params], *, on_top: bool = False
) -> Problem:
    """Return the problem with a start that a network makes from the support.

    With a solver of no steps (`mf.SGD(0.0, steps=0)`) the generated fast weights are used as they
    are: Doc-to-LoRA and Text-to-LoRA. With steps, adaptation starts from them.

    Args:
        problem: the problem with the losses, such as `mf.recipes.focusft_problem(model)`.
        generate: `(slow, support) -> fast`, differentiable by `slow`; the support as the inner
            loss sees it, a stream if it is one.
        on_top: adds what is generated to the start of the problem, such as a LoRA start, in
            place of using it alone.

    Example:
        >>> import torch, metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x.mean()) ** 2).sum()
        >>> made = generated(
        ...     mf.Problem(loss, loss), lambda slow, x: {"w": slow["a"] * x.mean()[None]})
        >>> meta = mf.bilevel(made, solver=mf.SGD(0.0, steps=0), estimator=mf.Unrolled())
        >>> x = torch.tensor([1.0, 3.0])
        >>> grads, _ = mf.hypergrad(meta)({"a": torch.tensor(0.5)}, mf.Episode(x, x))
        >>> grads["a"]
        tensor(-4.)

    References:
        Charakorn et al., Text-to-LoRA, arXiv 2506.06105.
    """
    start = _generated(generate, problem.init if on_top else None)
    return dataclasses.replace(problem, init=start)


@picklable
def _generated(
    generate: Callable[[Params, Any], Params], below: Callable[[Params, Any], Params] | None
) -> Callable[[Params, Any], Params]:
    def start(slow: Params, support: Any) -> Params:
        made = generate(slow, support)
        return made if below is None else pt.add(below(slow, support), made)

    return start
