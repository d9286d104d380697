"""The inner loop as a training run needs it: guarded against NaN, and timed."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus.estimators import Estimator
from metafocus.types import InnerLoss, Params, Solution, Solver

Record = Callable[[dict[str, Tensor]], None]


def start_seed(*key: int) -> int:
    """Return the seed of a generator, from what a resumed run knows too: no state to save.

    Example:
        >>> start_seed(0, 1) == start_seed(0, 1), start_seed(0, 1) == start_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Stopwatch:
    """Adds up durations: by the clock, or on CUDA by events, which do not make the host wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    def drain(self) -> float:
        """Return the seconds since the last call; on CUDA waits for the last event."""
        if self._events:
            self._events[-1][1].synchronize()
        total = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return total


@dataclass(frozen=True)
class Guarded(Estimator):
    """An estimator that leaves fast weights at their start where the inner loop is not finite.

    `fast = where(all losses and fast weights finite, adapted, start)`. Where the adapted fast
    weights are constants (first order), this needs no host synchronisation. Elsewhere a zero
    cotangent would meet NaN in the graph, so the host reads whether they are finite.

    Args:
        estimator: any estimator.
        record: receives `skipped` (how many adaptations were left out), `fast_weight_shift` (the
            norm of what the fast weights moved) and `fast_weight_norm` (theirs) at every call.
        clock: measures the inner loop.
        per_example: fast weights have a leading batch dimension, and are left out one by one.
    """

    estimator: Estimator
    record: Record
    clock: Stopwatch
    per_example: bool = False

    @property
    def explicit(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the estimator differentiates explicit tensors only."""
        return getattr(self.estimator, "explicit", False)

    @property
    def twice(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the estimator differentiates the gradient of the inner loss."""
        return getattr(self.estimator, "twice", True)

    def __call__(
        self, inner_loss: InnerLoss, solver: Solver, start: Params, outer: Params, support: Any
    ) -> Solution:
        """Run the inner loop."""
        with self.clock.running():
            params, losses, _ = self.estimator(inner_loss, solver, start, outer, support)
            if not params:
                return Solution(params, losses)
            good = self._finite(params, losses)
            if any(v.grad_fn is not None and v.requires_grad for v in params.values()):
                if not bool(good.all()):
                    good, params = torch.zeros_like(good), start
            else:
                params = {k: torch.where(_like(good, v), v, start[k]) for k, v in params.items()}
        with torch.no_grad():
            moved = [v - start[k] for k, v in params.items()]
            self.record(
                {
                    "skipped": (~good).sum(),
                    "fast_weight_shift": _norm(moved),
                    "fast_weight_norm": _norm(list(params.values())),
                }
            )
        return Solution(params, torch.where(losses.isfinite(), losses, 0.0))

    def _finite(self, params: Params, losses: Tensor) -> Tensor:
        """Which adaptations are finite: one boolean, or one for each example."""
        values = [v.detach().isfinite() for v in params.values()]
        if self.per_example:
            return torch.stack([v.flatten(1).all(1) for v in values]).all(0)
        return torch.stack([v.all() for v in values]).all() & losses.isfinite().all()


def _like(good: Tensor, value: Tensor) -> Tensor:
    return good.reshape(good.shape + (1,) * (value.ndim - good.ndim))


def _norm(values: list[Tensor]) -> Tensor:
    return torch.stack([v.detach().float().square().sum() for v in values]).sum().sqrt()
