"""Custom kernels in a graph that a loss differentiates itself, as a gradient penalty does.

The graph of such a loss holds what the backward passes of the kernels compute, not the kernels. A
backward pass without a graph loses a term of the loss's first derivative, without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metafocus import params as pt
from metafocus.autodiff.tape import foreign_nodes

_BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class _Searched(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BACKWARD and (kwargs or {}).get("create_graph"):
            self.names.update(foreign_nodes(pt.tensors(args[0])))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def differentiated_inside() -> Iterator[set[str]]:
    """Collect the names of custom kernels that a loss differentiates itself, in a `with` block."""
    with _Searched() as mode:
        yield mode.names
