"""The quadratic bilevel problem of benchopt's benchmark, and what W8 measures on it.

    G(z, x) = mean_i z A_i z / 2 + x B_i x / 2 + x C_i z + a_i z + b_i x

is the inner loss, F of the same form the outer one. numpy only: both sides import it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

PARTS = ("hess_z", "hess_x", "cross", "linear_z", "linear_x")
SIZES = {"n_samples_inner": 512, "n_samples_outer": 512, "dim_inner": 100, "dim_outer": 10}
START = -2.0
"""Every entry of the outer variable, as in its objective; the inner one starts at zero."""
GOAL = 1e-6


class Value:
    """The value function `h(x) = F(z*(x), x)`, in closed form: a quadratic in `x`."""

    def __init__(self, data: dict[str, np.ndarray]):
        inner, outer = ([data[f"{k} {p}"].mean(0) for p in PARTS] for k in ("inner", "outer"))
        az, _, ac, al, _ = inner
        fz, fx, fc, fl, fm = outer
        jacobian, start = -np.linalg.solve(az, ac.T), -np.linalg.solve(az, al)
        cross = fc @ jacobian
        self.hessian = jacobian.T @ fz @ jacobian + fx + cross + cross.T
        self.linear = jacobian.T @ (fz @ start + fl) + fc @ start + fm
        self.least = self(-np.linalg.solve(self.hessian, self.linear))

    def __call__(self, x: np.ndarray) -> float:
        """Return `h(x)` up to a constant."""
        return float(0.5 * x @ self.hessian @ x + self.linear @ x)

    def suboptimality(self, x: np.ndarray) -> float:
        """Return `h(x) - min h`."""
        return self(x) - self.least


class Trace:
    """Where a run was after how many steps and seconds; the clocks stand while it is looked at."""

    def __init__(self, limit: float, stop: Callable[[np.ndarray], bool]):
        self.limit, self.stop = limit, stop
        self.points: list[np.ndarray] = []
        self.seconds: list[tuple[float, float]] = []
        self.spent = np.zeros(2)
        self.since: np.ndarray | None = None

    def __call__(self, x: Any) -> bool:
        """Note where a run is; return whether it shall go on."""
        now = clocks()
        if self.since is not None:
            self.spent = self.spent + now - self.since
        self.points.append(np.asarray(x, dtype=np.float64).copy())
        self.seconds.append((float(self.spent[0]), float(self.spent[1])))
        more = self.spent[0] < self.limit and not self.stop(self.points[-1])
        self.since = clocks()
        return more


def clocks() -> np.ndarray:
    """Return seconds of the CPU and of the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def row(name: str, setting: str, calls: float, trace: Trace, value: Value) -> dict[str, Any]:
    """Return a run as JSON: `calls` oracle calls a step, in full batches."""
    error = [value.suboptimality(x) for x in trace.points]
    done = next((i for i, e in enumerate(error) if e <= GOAL), None)
    # About 60 points, evenly on a logarithmic axis, and the last.
    last = len(error) - 1 if done is None else done
    shown = sorted({0, last, *np.unique(np.geomspace(1, max(last, 1), 60).astype(int)).tolist()})
    points = [[i * calls, *trace.seconds[i], error[i]] for i in shown if i <= last]
    return {
        "name": name,
        "setting": setting,
        "calls_per_step": calls,
        "steps": last,
        "reached": done is not None,
        "least": min(error[: last + 1]),
        "points": points,
    }
