"""An adapter without fast weights, for plain fine-tuning with the same interface."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metafocus.errors import ProblemError


@dataclass(frozen=True)
class NoAdapter:
    """An adapter without fast weights: `mf.recipes.focusft(model, adapter=mf.NoAdapter())` is SFT.

    Example:
        >>> NoAdapter().init(nn.Linear(2, 2))
        {}
    """

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return no fast weights; nothing is drawn."""
        return {}

    def bind(
        self, model: nn.Module, fast: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that changes nothing.

        Raises:
            ProblemError: if there are fast weights.
        """
        if fast:
            raise ProblemError(
                f"NoAdapter has no place for the fast weights {sorted(fast)}: bind them with the "
                "adapter that made them."
            )
        return contextlib.nullcontext()
