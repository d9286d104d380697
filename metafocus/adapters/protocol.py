"""The protocol of an adapter, which connects fast weights and a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn


class Adapter(Protocol):
    """Defines fast weights and how a model sees them; `LoRA` is one."""

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the fast weights before the first inner step."""
        ...

    def bind(self, model: nn.Module, fast: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context manager inside which the model sees the fast weights."""
        ...
