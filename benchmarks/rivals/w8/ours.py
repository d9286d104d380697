"""This library's side: the same problem as tensors, single loops and an outer loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metafocus as mf
from benchmarks.rivals.w8.problem import GOAL, PARTS, SIZES, START, Trace, Value, row

State = dict[str, Any]


def loss(data: dict[str, Tensor], level: str) -> Callable[[mf.Params, mf.Params, Any], Tensor]:
    """Return a level's loss: the mean over its samples."""
    hess_z, hess_x, cross, linear_z, linear_x = (data[f"{level} {p}"] for p in PARTS)

    def of(fast: mf.Params, slow: mf.Params, batch: Any) -> Tensor:
        z, x = fast["z"], slow["x"]
        each = 0.5 * (hess_z @ z) @ z + 0.5 * (hess_x @ x) @ x + (cross @ z) @ x
        return (each + linear_z @ z + linear_x @ x).mean()

    return of


def problem(data: dict[str, Tensor]) -> tuple[mf.Problem, State]:
    """Return the problem, whose inner start is what the state holds: a warm start."""
    state: State = {"z": torch.zeros(SIZES["dim_inner"], dtype=torch.float64)}
    found = mf.Problem(
        loss(data, "inner"), loss(data, "outer"), lambda slow, support: {"z": state["z"]}
    )
    return found, state


def single_loop(method: Any, rate: float) -> Callable[[Trace], None]:
    """Return a run of SOBA or AmIGO with plain steps outside."""

    def run(trace: Trace) -> None:
        outer = {"x": torch.full((SIZES["dim_outer"],), START, dtype=torch.float64)}
        state = method.init(outer)
        while trace(outer["x"]):
            grads, state, _ = method.step(outer, state, mf.Episode(None, None))
            outer = {"x": outer["x"] - rate * grads["x"]}

    return run


def outer_loop(
    data: dict[str, Tensor], steps: int, products: int, optimizer: Callable[[list[Tensor]], Any]
) -> Callable[[Trace], None]:
    """Return a run of an outer optimiser on implicit hypergradients; the inner loop starts warm."""

    def run(trace: Trace) -> None:
        found, state = problem(data)
        meta = mf.bilevel(found, solver=mf.SGD(1.0, steps), estimator=mf.Implicit(mf.CG(products)))
        gradient = mf.hypergrad(meta)
        x = torch.full((SIZES["dim_outer"],), START, dtype=torch.float64, requires_grad=True)
        outside = optimizer([x])
        going = True

        def closure() -> Tensor:
            nonlocal going
            going = going and trace(x.detach())
            if not going:
                # A line search calls again before it ends.
                return torch.zeros((), dtype=torch.float64)
            with warnings.catch_warnings():
                # It compares with the start, which is warm: a small gradient already.
                warnings.simplefilter("ignore", mf.errors.NotStationaryWarning)
                grads, (value, aux) = gradient({"x": x.detach()}, mf.Episode(None, None))
            state["z"], x.grad = aux.params["z"], grads["x"]
            return value

        while going:
            outside.step(closure)

    return run


def gradient_descent(params: list[Tensor]) -> Any:
    return torch.optim.SGD(params, lr=1.0)


def lbfgs(params: list[Tensor]) -> Any:
    return torch.optim.LBFGS(params, lr=1.0, max_iter=1, history_size=10)


def rows(arrays: dict[str, np.ndarray], limit: float, only: str) -> list[dict[str, Any]]:
    """Return the runs whose name contains `only`."""
    data = {k: torch.as_tensor(v) for k, v in arrays.items()}
    found, value = problem(data)[0], Value(arrays)
    # Full-batch oracle calls of one step: gradients, products with second derivatives.
    runs: list[tuple[str, str, Callable[[Trace], None], float]] = []
    for rate, outer in ((1.0, 1.0), (0.1, 1.0)):
        setting = f"rates {rate}, outer {outer}"
        soba = mf.algorithms.SOBA(found, inner_lr=rate, v_lr=rate)
        amigo = mf.algorithms.AmIGO(found, inner_lr=rate, v_lr=rate, inner_steps=10, v_steps=10)
        runs.append(("metafocus SOBA", setting, single_loop(soba, outer), 3))
        # One gradient more than in JAX: for the stationarity that it reports.
        runs.append(("metafocus AmIGO", setting, single_loop(amigo, outer), 23))
    # Inner steps and products; gradients of the outer loss, and of the inner one at the solution
    # and at the start, which are compared; the mixed product.
    # 20 products leave 3e-4 of the solution; 10 leave a bias that ends above the goal.
    each = (20, 20, gradient_descent), (20, 20, lbfgs), (10, 20, lbfgs)
    for steps, products, optimizer in each:
        name = f"metafocus Implicit(CG({products})), {optimizer.__name__.replace('_', ' ')}"
        run = outer_loop(data, steps, products, optimizer)
        runs.append((name, f"{steps} inner steps", run, steps + products + 4))
    result = []
    for name, setting, run, calls in (r for r in runs if only in r[0]):
        trace = Trace(limit, lambda x: not value.suboptimality(x) > GOAL)
        run(trace)
        result.append(row(name, setting, calls, trace, value))
        print({k: v for k, v in result[-1].items() if k != "points"}, flush=True)
    return result
