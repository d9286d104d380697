"""FocuSFT inside Hugging Face's Trainer, TRL and accelerate.

`FocusTrainer` is `transformers.Trainer` with the meta-loss in place of the loss; `FocusMixin` adds
the same to any other trainer of that family.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metafocus.trainer.checkpoints import resumable
    from metafocus.trainer.config import FocusArguments, FocusOptions
    from metafocus.trainer.mixin import FocusMixin
    from metafocus.trainer.profiling import ProfileCallback
    from metafocus.trainer.trainer import FocusTrainer

__all__ = [
    "FocusArguments",
    "FocusMixin",
    "FocusOptions",
    "FocusTrainer",
    "ProfileCallback",
    "resumable",
]


_HOMES = {
    "FocusArguments": "config",
    "FocusMixin": "mixin",
    "FocusOptions": "config",
    "FocusTrainer": "trainer",
    "ProfileCallback": "profiling",
    "resumable": "checkpoints",
}


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import: only those who use it wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
