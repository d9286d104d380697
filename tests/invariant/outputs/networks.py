"""A small network, its loss, and tasks for it; the same numbers in every type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import metafocus as mf

TASKS, HIDDEN = 5, 6


def normal(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """The same numbers in every type, up to rounding."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {
        "0.weight": (HIDDEN, 3),
        "0.bias": (HIDDEN,),
        "2.weight": (2, HIDDEN),
        "2.bias": (2,),
    }
    return {k: 0.5 * normal(dtype, i, *shape) for i, (k, shape) in enumerate(shapes.items())}


def loss(fast, slow, data):
    x, y = data
    h = torch.nn.functional.silu(x @ fast["0.weight"].T + fast["0.bias"])
    return ((h @ fast["2.weight"].T + fast["2.bias"] - y) ** 2).mean()


def episodes(dtype: torch.dtype) -> mf.Episode:
    def half(seed: int, rows: int) -> tuple[Tensor, Tensor]:
        return normal(dtype, seed, TASKS, rows, 3), normal(dtype, seed + 1, TASKS, rows, 2)

    return mf.Episode(half(10, 8), half(20, 7))


def first(many: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x[0], many)


def plain(params, data):
    return loss(params, {}, data)


def penalties(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logarithms of decays for `mf.recipes.hpo.log_l2`: one for each entry, and one for all."""
    shapes = {"log_l2.0.weight": (HIDDEN, 3), "log_l2.2.weight": ()}
    return {k: torch.full(shape, -1.0, dtype=dtype) for k, shape in shapes.items()}
