"""What an adapter is: the one contract between fast weights and a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn


class Adapter(Protocol):
    """What fast weights are and how a model sees them: `LoRA` is one."""

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return fresh fast weights."""
        ...

    def bind(self, model: nn.Module, fast: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context manager inside which the model sees the fast weights."""
        ...
