"""Muon: momentum made orthogonal by Newton-Schulz iterations, differentiable."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from metafocus import params as pt
from metafocus.checks import fraction, positive, whole
from metafocus.solvers.adam import adam_direction
from metafocus.solvers.clipping import Clip, normalised
from metafocus.solvers.rates import Rate, check_settings, rates
from metafocus.types import Params, State

_ADJUST = ("original", "match_rms_adamw")


@dataclass(frozen=True)
class Muon:
    """Momentum made orthogonal, with the formulas of `torch.optim.Muon` in the weights' dtype.

    `b = momentum b + (1-momentum) g;  u = (1-momentum) g + momentum b` (Nesterov, else `b`)`;`
    `p = p (1 - lr * weight_decay) - lr * c * NS(u)`, with `NS`: `x = u / max(|u|, eps)`, then
    `ns_steps` times `x = a x + (b y + c y^2) x` where `y = x x'`.

    Shapes: a matrix is taken as it is; a tensor of more axes (a convolution) as the matrix
    `flatten(1)`, as in the author's code; a tensor of one or no axis (bias, gain) has no
    orthogonal form and takes the step of `Adam` with its default betas and eps. It usually wants
    a smaller rate: `lr=lambda outer: {"weight": 0.02, "bias": 3e-4}`. Embeddings and output
    heads are matrices here; torch asks the user to keep them out, and so leave them to `slow`.

    torch iterates in bfloat16 for weights of any type, and such steps have no useful derivatives.
    At a zero momentum the normalisation divides by `eps`: derivatives of every order
    are finite, but of the size `1 / eps`.

    Args:
        lr: as for `SGD`.
        steps: how many inner steps; 0 means no adaptation.
        momentum: decay of the running mean of gradients.
        nesterov: look ahead along the mean.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled; 0 as everywhere here (torch: 0.1).
        clip: as for `SGD`.
        ns_coefficients: `(a, b, c)`.
        eps: least norm to divide by.
        adjust: the factor `c`, by shape `[m, n]`: "original", `sqrt(max(1, m / n))`, or
            "match_rms_adamw", `0.2 sqrt(max(m, n))`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> Muon(0.02, steps=5).ns_steps
        5

    Jordan et al., kellerjordan.github.io/posts/muon (2024); Liu et al. (arXiv 2502.16982).
    """

    lr: Rate
    steps: int
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: float = 0.0
    clip: Clip | None = None
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    adjust: str = "original"

    def __post_init__(self) -> None:
        check_settings(self.lr, self.steps, self.weight_decay, self.clip)
        fraction("momentum", self.momentum)
        whole("ns_steps", self.ns_steps, 1)
        positive("eps", self.eps)
        if len(self.ns_coefficients) != 3:
            raise ValueError(f"ns_coefficients must be three, got {self.ns_coefficients}.")
        if self.adjust not in _ADJUST:
            raise ValueError(f"adjust must be one of {_ADJUST}, got {self.adjust!r}.")

    def init(self, params: Params) -> State:
        """Return zero means for matrices and zero moments for the rest."""
        matrices, rest = _split(params)
        return pt.zeros_like(matrices), (pt.zeros_like(rest), pt.zeros_like(rest))

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights, means and moments after one step."""
        if self.clip is not None:
            grads = self.clip(grads)
        means, moments = state
        matrices, rest = _split(grads)
        means = self._mean(matrices, means)
        looked = self._mean(matrices, means) if self.nesterov else means
        direction, moments = adam_direction(rest, moments, step, (0.9, 0.999), 1e-8)
        for k, u in looked.items():
            flat = u.flatten(1)
            direction[k] = (self._factor(*flat.shape) * self._orthogonal(flat)).reshape(u.shape)
        if self.weight_decay:
            direction = pt.add(direction, params, self.weight_decay)
        rate = rates(self.lr, outer, params, step)
        return {k: p - rate[k] * direction[k] for k, p in params.items()}, (means, moments)

    def _mean(self, grads: Params, means: Params) -> Params:
        return {k: self.momentum * means[k] + (1 - self.momentum) * g for k, g in grads.items()}

    def _factor(self, rows: int, columns: int) -> float:
        if self.adjust == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

    def _orthogonal(self, x: Tensor) -> Tensor:
        a, b, c = self.ns_coefficients
        tall = x.shape[0] > x.shape[1]
        x = normalised(x.mT if tall else x, self.eps)
        for _ in range(self.ns_steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


def _split(tensors: Params) -> tuple[Params, Params]:
    matrices = {k: v for k, v in tensors.items() if v.ndim >= 2}
    return matrices, {k: v for k, v in tensors.items() if v.ndim < 2}
