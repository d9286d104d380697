"""FocuSFT inside Hugging Face's Trainer, TRL and accelerate.

`FocusTrainer` is `transformers.Trainer` with the meta loss in place of the loss; `FocusMixin` adds
the same to any other trainer of that family.
"""

from __future__ import annotations

from metafocus.trainer.config import FocusArguments, FocusOptions
from metafocus.trainer.mixin import FocusMixin
from metafocus.trainer.trainer import FocusTrainer

__all__ = ["FocusArguments", "FocusMixin", "FocusOptions", "FocusTrainer"]
