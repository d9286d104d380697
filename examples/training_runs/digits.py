"""What the examples of this folder share: scikit-learn's digits, and a small network on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from metafocus.types import Params


def split(*sizes: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return disjoint parts of the digits as `{"x": [n, 64], "y": [n]}`, in a random order."""
    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order[: sum(sizes)].split(sizes)
    return [{"x": x[i].float() / 16, "y": y[i]} for i in parts]


def rows(data: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the data as a list of rows, as a map-style data set has them."""
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


def starter(hidden: int = 32, seed: int = 0) -> Callable[[], Params]:
    """Return a function that makes the same start of the network at each call."""
    g = torch.Generator().manual_seed(seed)
    drawn = {
        "w1": torch.randn(64, hidden, generator=g) / 8,
        "b1": torch.zeros(hidden),
        "w2": torch.randn(hidden, 10, generator=g) / hidden**0.5,
        "b2": torch.zeros(10),
    }
    return lambda: {k: v.clone() for k, v in drawn.items()}


def logits(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Return the network's scores, `[n, 10]`. It is smooth (tanh): metagradients need that."""
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def losses(params: Params, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the cross entropy of each row, `[n]`."""
    return F.cross_entropy(logits(params, batch["x"]), batch["y"], reduction="none")


def accuracy(params: Params, data: dict[str, torch.Tensor]) -> float:
    """Return the share of rows that are classified rightly."""
    return (logits(params, data["x"]).argmax(-1) == data["y"]).double().mean().item()
