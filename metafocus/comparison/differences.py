"""Central differences of a meta loss, with a step chosen for each tensor and an error estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.comparison.agreement import norm
from metafocus.engine import MetaLoss
from metafocus.errors import NonFiniteError, ProblemError
from metafocus.problem import moving
from metafocus.rng import Drawn
from metafocus.types import Params

DIFFERENCES = "central differences"
MOST = 10_000
"""The largest number of outer parameters: each takes six inner loops."""
FACTOR = 10**0.5
"""Between neighbouring steps. No ratio of small integers: the differences of a loss that is rounded
inside are multiples of one number, and would agree by chance."""
SMALLEST, LARGEST = -14, 9
"""Powers of `FACTOR` between which the step of a tensor is looked for."""
TRUSTED = 1e-2
"""Relative disagreement of neighbouring steps above which the differences are no reference."""


class Exact(NamedTuple):
    """A hypergradient to compare with.

    Attributes:
        grads: the hypergradient.
        error: of central differences: how much those at steps three times smaller and larger
            disagree with it, relative to its norm; None: no error is known.
    """

    grads: Params
    error: float | None = None


class _Best(NamedTuple):
    """The slopes of one tensor, the disagreement of their neighbours, and the largest step."""

    slopes: Tensor
    gap: float
    step: float

    @property
    def relative(self) -> float:
        """The disagreement relative to the slopes."""
        size = float(self.slopes.double().norm())
        return self.gap / size if size else math.inf


def check_size(outer: Params) -> None:
    """Raise if there are too many outer parameters for central differences."""
    total = sum(v.numel() for v in outer.values())
    if total > MOST:
        raise ProblemError(
            f"reference={DIFFERENCES!r} takes six inner loops for each of the {total:,} outer "
            f"parameters; it is offered up to {MOST:,}. Use an estimator such as mf.Unrolled(), "
            "and mf.smoothness to check it along a few directions."
        )


def differences(meta_loss: MetaLoss, outer: Params, episode: Any) -> Exact:
    """Return central differences of a meta loss, with the same random numbers at every point.

    The first step is the cube root of the rounding unit times `1 + |value|`, which balances
    rounding and the third derivative of a function of scale one. Where the differences at this
    step and its neighbours, three times smaller and larger, do not agree to half of the digits,
    the step grows (rounding is too large) or shrinks (the loss bends, or ends) as long as the
    agreement improves.

    Raises:
        ProblemError: in half precision, and if no step gives differences that agree.
    """
    check_size(outer)
    drawn = Drawn(pt.tensors((outer, episode)))

    def value(at: Params) -> tuple[Tensor, Params]:
        with drawn.again(), torch.no_grad():
            loss, aux = meta_loss(at, episode)
        return loss, aux.params

    free = moving(outer)
    for k, v in free.items():
        if v.is_complex():
            raise ProblemError(
                f"reference={DIFFERENCES!r} moves real numbers, and outer[{k!r}] is {v.dtype}: use "
                "an estimator such as mf.Unrolled()."
            )
    here, fast = value(outer)
    eps = _rounding([here, *free.values(), *fast.values()])
    steps = {k: eps ** (1 / 3) * (1 + v.detach().abs()) for k, v in free.items()}

    def slopes(k: str, power: int) -> Tensor:
        return _slopes(lambda v: float(value({**outer, k: v})[0]), free[k], steps[k], power)

    ladders = {k: _Ladder(slopes, k, steps[k]) for k in free}
    wanted = eps**0.5 * norm({k: ladder.at(0).slopes for k, ladder in ladders.items()})
    best = {k: ladder.improved(wanted) for k, ladder in ladders.items()}
    found = {k: best[k].slopes if k in best else v.new_zeros(v.shape) for k, v in outer.items()}
    size = norm(found)
    if size == 0:
        _refuse_plateau(lambda at: float(value(at)[0]), outer, free, float(here), steps)
    gap = math.hypot(*(b.gap for b in best.values()))
    error = gap / size if size else 0.0
    if error > TRUSTED:
        k = max(best, key=lambda k: best[k].gap)
        raise ProblemError(
            f"reference={DIFFERENCES!r}: differences at neighbouring steps disagree by "
            f"{error:.0%} of the hypergradient, most for outer[{k!r}] at a step of "
            f"{best[k].step:.1e}. Rounding hides the differences, or the loss is not smooth. Use "
            "float64 for outer, data and model, or an estimator such as mf.Unrolled()."
        )
    return Exact(found, error)


class _Ladder:
    """Slopes of one tensor at steps that are powers of `FACTOR` times the first one."""

    def __init__(self, slopes: Callable[[str, int], Tensor], name: str, step: Tensor):
        self.slopes, self.name, self.step = slopes, name, step
        self.known: dict[int, Tensor] = {}

    def at(self, power: int) -> _Best:
        """Return the slopes at a step, and how far those of its neighbours are from them."""
        for p in (power - 1, power, power + 1):
            if p not in self.known:
                self.known[p] = self.slopes(self.name, p)
        below, here, above = (self.known[p] for p in (power - 1, power, power + 1))
        gaps = [float((here - other).double().norm()) for other in (below, above)]
        step = float(self.step.max()) * FACTOR**power
        if not all(map(math.isfinite, gaps)):
            return _Best(torch.zeros_like(here), math.inf, step)
        return _Best(here, max(gaps), step)

    def improved(self, wanted: float) -> _Best:
        """Return the slopes at the step whose neighbours agree best, or at the first good one."""
        chosen, best = 0, self.at(0)
        for way, end in ((1, LARGEST), (-1, SMALLEST)):
            worse = 0
            for power in range(way, end + way, way):
                # Two in a row: where the loss oscillates, one may be so by chance.
                if best.gap <= wanted or worse == 2:
                    break
                tried = self.at(power)
                if tried.relative < best.relative:
                    chosen, best, worse = power, tried, 0
                elif way > 0 or math.isfinite(tried.gap):
                    # Outside its domain a loss is not finite: only a smaller step helps.
                    worse += 1
        if best.gap <= wanted:
            return best
        # The best of several agrees too well by chance. Rounding grows with 1 / step, so that
        # a smaller step shows how large it is here.
        rounding = self.at(chosen - 1).gap / FACTOR
        return best._replace(gap=max(best.gap, rounding if math.isfinite(rounding) else 0.0))


def _slopes(value: Callable[[Tensor], float], v: Tensor, step: Tensor, power: int) -> Tensor:
    found = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for i in range(v.numel()):
        ends = []
        for sign in (1.0, -1.0):
            moved = v.detach().clone(memory_format=torch.contiguous_format)
            moved.view(-1)[i] += sign * FACTOR**power * step.reshape(-1)[i]
            try:
                ends.append((value(moved), float(moved.view(-1)[i])))
            except NonFiniteError:
                ends.append((math.nan, 0.0))
        (up, high), (down, low) = ends
        found.view(-1)[i] = (up - down) / (high - low) if high != low else math.nan
    return found


def _rounding(tensors: list[Tensor]) -> float:
    """Return the rounding unit of the coarsest type."""
    worst = max(
        (x.dtype for x in tensors if x.is_floating_point()), key=lambda t: torch.finfo(t).eps
    )
    if worst.itemsize < 4:
        raise ProblemError(
            f"reference={DIFFERENCES!r} needs float32 or float64, and outer, the fast weights or "
            f"the loss are {worst}: a difference of two losses would be rounding. Convert them, "
            "or use an estimator such as mf.Unrolled()."
        )
    return torch.finfo(worst).eps


def _refuse_plateau(
    value: Callable[[Params], float],
    outer: Params,
    free: Params,
    here: float,
    steps: Params,
) -> None:
    """Raise if a loss that small steps do not change at all is changed by large ones."""
    moved = {k: v + 0.1 * (1 + v.abs()) for k, v in free.items()}
    if value({**outer, **moved}) != here:
        largest = FACTOR * max(float(step.max()) for step in steps.values())
        raise ProblemError(
            f"reference={DIFFERENCES!r}: no step up to {largest:.1e} changes the loss, and larger "
            "ones do. It is rounded inside, or constant here: use a wider type, or an estimator "
            "such as mf.Unrolled()."
        )
