"""Evolution strategies: the hypergradient from values alone, no derivative of anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.calls import attempted, draws_from
from metafocus.checks import function, positive, scalar, seeded, whole
from metafocus.engine.outer_call import META_LOSS
from metafocus.errors import NonFiniteError
from metafocus.problem import check_params, constants, moving, refuse_empty
from metafocus.rng import replayed
from metafocus.torch_internals import transforming
from metafocus.types import Params


class EvolutionState(NamedTuple):
    """An empty state: the steps of `Evolution` do not depend on each other."""


@dataclass(frozen=True)
class Evolution:
    """The antithetic evolution-strategies estimate of the derivative of any meta loss.

    `g = 1 / (2 sigma pairs) sum_i (L(outer + sigma e_i) - L(outer - sigma e_i)) e_i` with
    `e_i ~ N(0, I)`: unbiased for the gradient of the smoothed loss `E L(outer + sigma e)`, which
    for a quadratic `L` is the gradient of `L` itself. Losses, inner solvers and estimators need
    not be differentiable; an accuracy will do.

    An object of this class is a meta loss itself: `evolution(outer, episode) -> (loss, aux)` has
    the value `L(outer)` and the derivative `g`, attached straight-through,
    `L(outer) + <g, outer - outer.detach()>`, so it goes wherever any meta loss goes. `step` gives
    `g` in the form of the other algorithms.

    Only `outer` gets a derivative, and `g` is a constant: second derivatives are zero.

    It differentiates values, and these see through `detach()`: where the inner loss detaches
    something that depends on the fast weights (Meta-Weight-Net), the estimate tends to another
    derivative than the tape gives from the second inner step on.

    Args:
        meta_loss: `(outer, episode) -> (loss, aux)`, of `mf.bilevel` or any function of this form
            that runs under `vmap`.
        sigma: standard deviation of the perturbations.
        pairs: number of antithetic pairs; the variance falls as `1 / pairs`.
        generator: where the perturbations come from; every call advances it. Under an outer
            `vmap`, set what random operations do there: `randomness="same"` or `"different"`.
        chunk_size: how many pairs `vmap` runs at once; None: all. The draws do not depend on it;
            memory does.

    `aux` is that of the unperturbed evaluation. Random numbers that `meta_loss` itself draws are
    the same for all perturbations.

    Raises:
        ValueError: for an argument out of its range or a missing generator.
        ProblemError: at the first call, if `outer` is empty.
        NonFiniteError: outside transforms, if a perturbed loss is NaN or infinite.

    Example:
        >>> import metafocus as mf
        >>> def wrong(outer, x):
        ...     return (outer["w"] * x < 0).double().mean(), None
        >>> generator = torch.Generator().manual_seed(0)
        >>> loss = mf.algorithms.Evolution(wrong, sigma=1.0, pairs=1000, generator=generator)
        >>> w = {"w": torch.tensor([0.5], requires_grad=True)}
        >>> loss(w, torch.ones(1))[0].backward()
        >>> w["w"].grad < 0
        tensor([True])

    References:
        Salimans et al., arXiv 1703.03864; Metz et al., arXiv 1810.10180 (for unrolls).
    """

    meta_loss: Callable[[Params, Any], tuple[Tensor, Any]]
    sigma: float
    pairs: int
    generator: torch.Generator = field(compare=False)
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        function("meta_loss", self.meta_loss, META_LOSS, 2)
        check(self.sigma, self.pairs, self.chunk_size)
        seeded(self.generator)

    def __call__(self, outer: Params, episode: Any) -> tuple[Tensor, Any]:
        """Return the loss at `outer`, with the estimate as its derivative, and aux."""
        grads, value, aux = self._estimate(outer, episode)
        shift = pt.dot(pt.detach(grads), pt.sub(outer, pt.detach(outer)))
        return value + shift.to(value.dtype), aux

    def init(self, outer: Params, support: Any = None) -> EvolutionState:
        """Return the state before the first step: nothing."""
        return EvolutionState()

    def step(
        self, outer: Params, state: EvolutionState, episode: Any
    ) -> tuple[Params, EvolutionState, Any]:
        """Return the estimate for the outer parameters, the state and aux, all detached."""
        grads, _, aux = self._estimate(outer, episode)
        return grads, state, aux

    @attempted
    def _estimate(self, outer: Params, episode: Any) -> tuple[Params, Tensor, Any]:
        draws_from(self.generator)
        check_params(outer, "outer", "outer parameters")
        refuse_empty(outer, "Evolution")
        outer = constants(outer)
        centre = moving(outer)
        grads = pt.zeros_like(centre)
        size = self.pairs if self.chunk_size is None else self.chunk_size
        with torch.no_grad():
            losses_at = replayed(_losses_at(self.meta_loss, outer), pt.tensors((centre, episode)))
            value, aux = self.meta_loss(outer, episode)
            value = scalar(value, "meta_loss").detach()
            for first in range(0, self.pairs, size):
                count = min(size, self.pairs - first)
                # One pair at a time: the numbers are the same for every chunk_size.
                draws = [normal(centre, 1, self.generator) for _ in range(count)]
                noise = {k: torch.cat([draw[k] for draw in draws]) for k in centre}
                losses = losses_at(spread(centre, noise, self.sigma), episode)
                check_losses(losses)
                grads = pt.add(grads, contract(losses, noise, self.sigma * self.pairs))
        return pt.zeros_like(outer) | grads, value, aux


def normal(like: Params, pairs: int, generator: torch.Generator) -> Params:
    """Return standard normal perturbations, stacked: `[pairs, ...]` for each parameter."""
    return {
        k: torch.randn(
            (pairs, *v.shape), generator=generator, dtype=v.dtype, device=generator.device
        ).to(v.device)
        for k, v in like.items()
    }


def spread(centre: Params, noise: Params, sigma: float) -> Params:
    """Return `centre + sigma * noise` and then `centre - sigma * noise`: `[2 * pairs, ...]`."""
    return {k: torch.cat([v + sigma * noise[k], v - sigma * noise[k]]) for k, v in centre.items()}


def contract(losses: Tensor, noise: Params, scale: float) -> Params:
    """Return `sum_i (losses[0, i] - losses[1, i]) / 2 * noise_i / scale`."""
    gains = (losses[0] - losses[1]) / (2 * scale)
    return {k: torch.tensordot(gains.to(e.dtype), e, dims=1) for k, e in noise.items()}


def check(sigma: float, pairs: int, chunk_size: int | None) -> None:
    """Raise for arguments that no evolution strategy accepts."""
    positive("sigma", sigma)
    whole("pairs", pairs, 1)
    if chunk_size is not None:
        whole("chunk_size", chunk_size, 1)


def check_losses(losses: Tensor) -> None:
    """Raise outside transforms if a perturbed loss is not finite; one host synchronisation."""
    if transforming():
        return
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise NonFiniteError(
            f"The loss is NaN or infinite at {bad} of {losses.numel()} perturbed outer "
            "parameters. Lower sigma, or make the inner loop stable around outer."
        )


def _losses_at(
    meta_loss: Callable[[Params, Any], tuple[Tensor, Any]], outer: Params
) -> Callable[[Params, Any], Tensor]:
    def losses_at(points: Params, episode: Any) -> Tensor:
        def one(point: Params) -> Tensor:
            at = {k: point.get(k, v) for k, v in outer.items()}
            return scalar(meta_loss(at, episode)[0], "meta_loss")

        # Both halves in one vmap, so that "same" makes their random numbers common.
        return torch.func.vmap(one, randomness="same")(points).reshape(2, -1)

    return losses_at
