"""What workloads and contenders share. Imports torch only: it runs in every environment."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Contenders = dict[str, Callable[[], Tensor]]
"""By label: each call returns one flat hypergradient."""


def flat(grads: Iterable[Tensor]) -> Tensor:
    """Return the entries of all tensors in one, detached."""
    return torch.cat([g.detach().reshape(-1) for g in grads])


def cast(data: Any, dtype: torch.dtype) -> Any:
    """Return nested dicts and lists of tensors with the floating-point ones in `dtype`."""
    if isinstance(data, dict):
        return {k: cast(v, dtype) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [cast(v, dtype) for v in data]
    return data.to(dtype) if isinstance(data, Tensor) and data.is_floating_point() else data


def initial(net: nn.Module) -> dict[str, Tensor]:
    """Return detached float64 copies of a network's parameters."""
    return {k: v.detach().double().clone() for k, v in net.named_parameters()}


def loaded(net: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """Return the network with these parameters in it, in their dtype."""
    net = net.to(next(iter(params.values())).dtype)
    with torch.no_grad():
        for k, p in net.named_parameters():
            p.copy_(params[k])
    return net


def take_grads(params: Iterable[nn.Parameter]) -> Tensor:
    """Return `.grad` of the parameters, flat, and clear it."""
    params = list(params)
    found = flat(p.grad for p in params if p.grad is not None)
    for p in params:
        p.grad = None
    return found


def bare_package(name: str) -> None:
    """Make a package importable without its `__init__`, for its submodules' sake.

    Some packages import a gym or image data sets before anything of theirs can be used.
    """
    parent, _, last = name.rpartition(".")
    roots = sys.modules[parent].__path__ if parent else sys.path
    found = [str(Path(root) / last) for root in roots if (Path(root) / last).is_dir()]
    if not found:
        raise ImportError(f"no package {name!r} on {list(roots)}")
    module = types.ModuleType(name)
    module.__path__ = found[:1]
    sys.modules[name] = module
