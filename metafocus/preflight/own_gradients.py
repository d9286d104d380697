"""Custom kernels in a graph that a loss differentiates itself, as a gradient penalty does.

The graph of such a loss holds what the backward passes of the kernels compute, not the kernels. A
backward pass without a graph loses a term of the loss's first derivative, without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metafocus import params as pt
from metafocus.autodiff.tape import foreign_nodes

_BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_DETACHING = (Tensor.detach, torch.detach)


class OwnGradients(TorchFunctionMode):
    """Watches a loss in a `with` block.

    Attributes:
        kernels: the names of the custom kernels that it differentiates itself.
        detaches: whether it detaches anything; then it may cut off the data on purpose.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()
        self.detaches: bool = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.detaches = self.detaches or func in _DETACHING
        if func in _BACKWARD and (kwargs or {}).get("create_graph"):
            self.kernels.update(foreign_nodes(pt.tensors(args[0])))
        return func(*args, **(kwargs or {}))
