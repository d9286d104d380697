"""Which weights of a Hugging Face model are written to a checkpoint."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def is_saved(model: nn.Module, name: str) -> bool:
    """Return whether `save_pretrained` writes the weight of this name.

    Some models leave out weights that they compute when they are made.
    """
    left_out: Any = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return not any(re.search(pattern, name) for pattern in left_out)
