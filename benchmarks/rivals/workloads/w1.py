"""W1: MAML on sinusoids, 25 tasks at once; an MLP 1-40-40-1, ten support and ten query points."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.common import initial
from benchmarks.rivals.targets import Target

TITLE = "W1: MAML on sinusoids"
TEXT = """
25 tasks, MLP 1-40-40-1 with ReLU, 10 support and 10 query points, inner learning rate 0.01, one
meta-gradient of the mean query loss. Libraries without `vmap` loop over the tasks in their own
idiom. *compiled* is `mf.compiled` of *vmap*; its first call compiles.
"""
REFERENCE = "torch.autograd loop"
TOLERANCE = 1e-10
REPEATS = 9
MEMORY = {"steps": 5, "order": 2}
TASKS, RATE = 25, 0.01


def cases(quick: bool) -> list[dict[str, Any]]:
    """Steps and orders."""
    orders = [2] if quick else [2, 1]
    return [{"steps": k, "order": order, "tasks": TASKS} for order in orders for k in (1, 5)]


def network() -> nn.Module:
    """Return the network of MAML's section 5.1."""
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(prediction, target)


def data(case: dict[str, Any]) -> dict[str, Any]:
    """Draw tasks as MAML does: amplitude 0.1 to 5, phase 0 to pi, points in [-5, 5]."""
    tasks = case["tasks"]
    amplitude = torch.empty(tasks, 1, 1, dtype=torch.float64).uniform_(0.1, 5)
    phase = torch.empty(tasks, 1, 1, dtype=torch.float64).uniform_(0, math.pi)
    x = torch.empty(tasks, 20, 1, dtype=torch.float64).uniform_(-5, 5)
    y = amplitude * torch.sin(x - phase)
    return {
        "params": initial(network()),
        "support": (x[:, :10], y[:, :10]),
        "query": (x[:, 10:], y[:, 10:]),
    }


COMPILED = "metafocus compiled"
SECOND = {"steps": 5, "order": 2}
TARGETS = [
    Target("at least 6 times as fast as learn2learn", "metafocus vmap", "learn2learn MAML",
           1 / 6, case=SECOND),
    Target("at least 6 times as fast as TorchOpt's loop", "metafocus vmap", "TorchOpt MetaSGD",
           1 / 6, case=SECOND),
    Target("at least 8 times as fast as higher", "metafocus vmap", "higher", 1 / 8, case=SECOND),
    Target("at least 8 times as fast as BOAT", "metafocus vmap", "BOAT NGD+IAD", 1 / 8,
           case=SECOND),
    Target("compiled at least 1.5 times as fast again", COMPILED, "metafocus vmap", 1 / 1.5,
           case=SECOND),
    Target("no overhead over hand-written vmap", "metafocus vmap", "torch.func vmap", 1.05,
           case={"order": 2}),
    Target("no overhead over hand-written vmap, first order", "metafocus vmap",
           "torch.func vmap", 1.05, case={"order": 1}),
]  # fmt: skip


def report(results: dict[str, Any]) -> list[str]:
    """Return what the first call of the compiled form takes."""
    found = [run["rows"].get(COMPILED, {}) for run in results["runs"]]
    seconds = next((row["first_call"] for row in found if "first_call" in row), None)
    if seconds is None:
        return []
    return [f"*metafocus compiled*: the first call took {seconds:.0f} s of the clock.", ""]
