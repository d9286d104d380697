"""Whether a training run can be trusted with a metagradient: how smooth it is, and a spot check."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import positive, seeded, whole
from metafocus.engine import adapt, bilevel, hypergrad
from metafocus.estimators import Estimator, Unrolled
from metafocus.problem import Problem, constants, moving
from metafocus.rng import Drawn
from metafocus.types import Params, Solver

SMOOTH = 0.9
"""Smoothness from which moves of the outer parameters have predictable effects."""
AGREES = 1e-2
"""Relative error up to which the metagradient agrees with central differences."""


class Probe(NamedTuple):
    """What was found along one random direction.

    Attributes:
        smoothness: between -1 and 1; at 1 the trained weights keep their direction.
        predicted: the metagradient along the direction.
        difference: the central difference of the outer loss.
        floor: the part of `difference` that is rounding: eps of the fast weights' type times the
            outer loss, over the step.
        step: the length of the step: `h`, or a tenth or a hundredth of it where the outer loss
            bends within `h` and rounding allows a smaller one.
    """

    smoothness: float
    predicted: float
    difference: float
    floor: float
    step: float

    @property
    def error(self) -> float:
        """The distance of both, relative to the larger one."""
        largest = max(abs(self.predicted), abs(self.difference))
        return abs(self.predicted - self.difference) / largest if largest else 0.0


@dataclass(frozen=True)
class Smoothness:
    """A report on one training run.

    Attributes:
        probes: one for each direction.
        h: the length of a step along a direction.
        verdict: "trustworthy": the run is smooth, and the metagradient predicts steps of `h`;
            "curved": it agrees with smaller steps only; "not smooth": it says little about any
            step of that size; "wrong": the run is smooth and they disagree; "too coarse":
            rounding hides the difference, so use a wider type or a larger `h`; "no effect":
            nothing moves.
    """

    probes: tuple[Probe, ...]
    h: float
    verdict: str

    @property
    def value(self) -> float:
        """The mean smoothness over the directions."""
        return statistics.fmean(probe.smoothness for probe in self.probes)

    def __str__(self) -> str:
        head = f"smoothness {self.value:.3f} at h = {self.h:g}: {self.verdict}"
        rows = [
            f"  {p.smoothness:6.3f}  metagradient {p.predicted: .4e}  central difference "
            f"{p.difference: .4e}  error {p.error:.1e}  step {p.step:g}  rounding {p.floor:.1e}"
            for p in self.probes
        ]
        return "\n".join([head, *rows])


def smoothness(
    problem: Problem,
    outer: Params,
    episode: Any,
    *,
    solver: Solver,
    h: float = 1e-2,
    directions: int = 3,
    generator: torch.Generator,
    estimator: Estimator | None = None,
) -> Smoothness:
    """Return how smoothly a training run depends on `outer`, and whether its metagradient is right.

    Empirical metasmoothness: with `A(z)` the weights trained under outer parameters `z` and
    `D(z) = A(z + h v) - A(z)`, the mean agreement of the signs of `D(z)` and `D(z + h v)`,
    weighed by `|D(z) + D(z + h v)|`. The entries of a direction `v` have size one, so `h` is in
    the units of `outer`. Each direction takes four runs, and up to four smaller steps where
    the outer loss bends.

    Args:
        problem: the problem; its start must be the same at every call.
        outer: the outer parameters at which the run is examined.
        episode: support and query.
        solver: the optimiser of the run.
        h: how far to move each outer parameter.
        directions: how many random directions, of signs plus and minus one.
        generator: draws the directions.
        estimator: the estimator of the metagradient that is checked; None: the exact one.

    Raises:
        ValueError: if `h` is not positive or `directions` is not a positive integer.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - slow["c"] * x) ** 2).sum()
        >>> problem = mf.Problem(loss, loss, lambda slow, _: {"w": torch.zeros(2)})
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> report = smoothness(
        ...     problem, {"c": torch.ones(2).double()}, mf.Episode(x, 2 * x),
        ...     solver=mf.SGD(0.1, steps=9), generator=torch.Generator().manual_seed(0))
        >>> report.verdict
        'trustworthy'

    References:
        Engstrom et al., arXiv 2503.13751, Definition 2.
    """
    positive("h", h)
    whole("directions", directions, 1)
    seeded(generator)
    outer = constants(outer)
    exact = Unrolled(recompute=True) if estimator is None else estimator
    meta = bilevel(problem, solver=solver, estimator=exact)
    drawn = Drawn(pt.tensors((outer, episode)))

    def again(run: Any) -> Any:
        # The same dropout in every run.
        with drawn.again():
            return run()

    def trained(at: Params) -> Tensor:
        support = episode[0]
        fast = again(lambda: adapt(problem, at, support, solver=solver)).params
        return torch.cat([v.reshape(-1).double() for v in fast.values()])

    def reached(at: Params) -> float:
        with torch.no_grad():
            return float(again(lambda: meta(at, episode))[0])

    def tried(way: Params, step: float, agreement: float) -> Probe:
        predicted = float(pt.dot({k: grads[k].double() for k in way}, _double(way)))
        ends = [reached(_moved(outer, way, by)) for by in (step, -step)]
        floor = eps * abs(float(loss)) / step
        return Probe(agreement, predicted, (ends[0] - ends[1]) / (2 * step), floor, step)

    grads, (loss, _) = again(lambda: hypergrad(meta)(outer, episode))
    free, here = moving(outer), trained(outer)
    eps = max(torch.finfo(v.dtype).eps for v in problem.first(outer, episode[0]).values())
    probes = []
    for _ in range(directions):
        way = {k: _signs(v, generator) for k, v in free.items()}
        ahead, beyond = (trained(_moved(outer, way, c * h)) for c in (1, 2))
        agreement = _agreement(ahead - here, beyond - ahead)
        probe = tried(way, h, agreement)
        for step in (h / 10, h / 100):
            if not _clear(probe) or probe.error <= AGREES:
                break
            smaller = tried(way, step, agreement)
            probe = smaller if _clear(smaller) else probe
        probes.append(probe)
    return Smoothness(tuple(probes), h, _verdict(probes, h))


def _agreement(once: Tensor, twice: Tensor) -> float:
    """Return the agreement of the signs of two moves, weighed by the size of both together."""
    size = (once + twice).abs()
    total = size.sum()
    return float((size * once.sign() * twice.sign()).sum() / total) if total else 0.0


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, x.shape, generator=generator, device=generator.device)
    return (2 * drawn - 1).to(x)


def _double(tree: Params) -> Params:
    return {k: v.double() for k, v in tree.items()}


def _moved(outer: Params, way: Params, by: float) -> Params:
    return {k: v + by * way[k] if k in way else v for k, v in outer.items()}


def _clear(probe: Probe) -> bool:
    """Return whether rounding leaves enough digits of a difference."""
    return abs(probe.difference) * AGREES > probe.floor


def _verdict(probes: list[Probe], h: float) -> str:
    if all(p.predicted == p.difference == p.smoothness == 0 for p in probes):
        return "no effect"
    clear = [p for p in probes if _clear(p)]
    if not clear:
        return "too coarse"
    if statistics.fmean(p.smoothness for p in probes) < SMOOTH:
        return "not smooth"
    if any(p.error > AGREES for p in clear):
        return "wrong"
    return "trustworthy" if all(p.step == h for p in clear) else "curved"
