"""W2: MAML on a four-layer convolutional network, BatchNorm with the statistics of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.common import initial
from benchmarks.rivals.targets import Target

TITLE = "W2: MAML on Conv4"
TEXT = """
8 tasks of 5-way 1-shot with 25 query images of 28 x 28, four blocks of 64 channels (convolution,
BatchNorm without running statistics, ReLU, pooling), K = 5, inner learning rate 0.1, one
meta-gradient. The float64 check is made on two tasks.
"""
REFERENCE = "torch.autograd loop"
TOLERANCE = 1e-8
REPEATS = 4
MEMORY = {"order": 2}
RATE = 0.1


def cases(quick: bool) -> list[dict[str, Any]]:
    """Both orders."""
    tasks = 2 if quick else 8
    return [{"steps": 5, "order": order, "tasks": tasks} for order in (2, 1)]


def check_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case with two tasks."""
    return {**case, "tasks": 2}


def network() -> nn.Module:
    """Return four blocks and a classifier."""
    blocks: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        blocks += [
            nn.Conv2d(channels, 64, 3, padding=1),
            nn.BatchNorm2d(64, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 5))


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy."""
    return nn.functional.cross_entropy(prediction, target)


def data(case: dict[str, Any]) -> dict[str, Any]:
    """Draw images of five classes: a pattern for each, and noise."""
    tasks = case["tasks"]
    pattern = torch.randn(tasks, 5, 1, 28, 28, dtype=torch.float64)
    label = torch.arange(30).remainder(5).expand(tasks, 30)
    images = pattern[:, torch.arange(30).remainder(5)]
    images = images + torch.randn(tasks, 30, 1, 28, 28, dtype=torch.float64)
    return {
        "params": initial(network()),
        "support": (images[:, :5], label[:, :5].clone()),
        "query": (images[:, 5:], label[:, 5:].clone()),
    }


SECOND = {"order": 2}
TARGETS = [
    Target("no slower than the fastest rival", "metafocus loop", "fastest", 1.05, case=SECOND),
    Target("at most 1.2 times the memory of the fastest rival", "metafocus loop", "fastest", 1.2,
           "process_bytes", case=SECOND),
]  # fmt: skip


def report(results: dict[str, Any]) -> list[str]:
    """Return which layout of the tasks is the fastest and which the leanest."""
    rows = next(run["rows"] for run in results["runs"] if SECOND.items() <= run["case"].items())
    ours = {k: row for k, row in rows.items() if k.startswith("metafocus") and "ratio" in row}
    fastest = min(ours, key=lambda k: ours[k]["ratio"])
    leanest = min(ours, key=lambda k: ours[k].get("process_bytes", float("inf")))
    return [
        f"Of the layouts of this library, *{fastest}* is the fastest here and *{leanest}* the "
        'leanest, at second order. The rule: `over_tasks(how="loop")` for convolutions on a CPU, '
        'whose kernels are busy with one task; `how="vmap"`, the default, where kernels are small '
        "(W1, W7).",
        "",
    ]
