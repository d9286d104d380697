"""W3: a long unroll, K = 50 steps of SGD with momentum 0.9; gradient by the initial parameters."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.common import initial
from benchmarks.rivals.targets import Target

TITLE = "W3: a long unroll"
TEXT = """
K = 50 inner steps of SGD with momentum 0.9, gradient of the final loss by the initial parameters.
*published*: MLP 784-256-10, batch 64. *deep*: MLP 784-256-256-256-256-10, batch 512. tanh. The
float64 check takes 20 steps.
"""
REFERENCE = "torch.autograd loop"
TOLERANCE = 1e-11  # rounding through 50 steps
REPEATS = 5
MEMORY = {"size": "deep"}
RATE, MOMENTUM = 0.05, 0.9
WIDTHS = {"published": (784, 256, 10), "deep": (784, 256, 256, 256, 256, 10)}
BATCH = {"published": 64, "deep": 512}


def cases(quick: bool) -> list[dict[str, Any]]:
    """The published size and the deep one."""
    return [{"size": size, "steps": 10 if quick else 50} for size in WIDTHS]


def check_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case with 20 steps: as in all, one segment is shorter."""
    return {**case, "steps": min(case["steps"], 20)}


def network(case: dict[str, Any]) -> nn.Module:
    """Return the MLP."""
    layers: list[nn.Module] = []
    widths = WIDTHS[case["size"]]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy."""
    return nn.functional.cross_entropy(prediction, target)


def data(case: dict[str, Any]) -> dict[str, Any]:
    """Draw a batch."""
    batch = BATCH[case["size"]]
    return {
        "params": initial(network(case)),
        "x": torch.randn(batch, 784, dtype=torch.float64),
        "y": torch.randint(0, 10, (batch,)),
    }


DEEP = {"size": "deep"}
LEAN = "metafocus recompute=14"
TARGETS = [
    Target("at most 0.3 times the memory of higher", LEAN, "higher", 0.3, "process_bytes", DEEP),
    Target("at no more than 1.3 times its time", LEAN, "higher", 1.3, case=DEEP),
    Target("graph form against the fastest rival", "metafocus graph", "fastest", 1.05),
]


def report(results: dict[str, Any]) -> list[str]:
    """Return what the products alone cost that are made twice."""
    steps, segment = 50, int(LEAN.partition("=")[2])
    # Of a layer with an input that needs a gradient; the first, which does not, has fewer of both.
    gradient, derivative = 5, 8
    least = 1 + (steps - segment) / steps * gradient / (gradient + derivative)
    return [
        f"*{LEAN}* runs {steps - segment} of {steps} steps twice. Counted in products with a "
        f"layer's matrix, the gradient of an inner step is {gradient} and its derivative "
        f"{derivative}, so {least:.2f} times the graph form is the least.",
        "",
        *[line for run in results["runs"] for line in _spread(run)],
    ]


SAME = ("torch.autograd loop", "hypertorch unroll", "learn2learn primitives", "TorchOpt MetaSGD")


def _spread(run: dict[str, Any]) -> list[str]:
    """Return how far forms that run the same kernels lie apart: what a ratio here can tell."""
    ratios = [run["rows"].get(k, {}).get("ratio") for k in SAME]
    ours = run["rows"].get("metafocus graph", {}).get("ratio")
    if ours is None or None in ratios:
        return []
    return [
        f"Size *{run['case']['size']}*, threads: {run['threads']}. {', '.join(SAME)} run the same "
        f"kernels, and their ratios lie from {min(ratios):.2f} to {max(ratios):.2f}; that of "
        f"*metafocus graph*, which does too, is {ours:.2f}.",
        "",
    ]
