"""Mask policies: which keys each query of a batch may attend to, as one interval per query.

A batch is a dict of `[B, S]` tensors: `input_ids`, `attention_mask` (if it is missing, there is no
padding), `answer_mask` (True on the tokens to be predicted), `turn_ids` (-1 on padding) and, for
packed rows, `document_ids`. A policy is any function `batch -> Spans`. In all policies of this
package documents do not see each other, padding sees nothing and is not seen, and padding may be on
either side.
"""

from __future__ import annotations

from metafocus.masks.entries import Batch
from metafocus.masks.layout import positions
from metafocus.masks.policies import (
    MaskPolicy,
    causal,
    context_bidirectional,
    full,
    prefix_lm,
    sliding_window,
)
from metafocus.masks.spans import Spans

__all__ = [
    "Batch",
    "MaskPolicy",
    "Spans",
    "causal",
    "context_bidirectional",
    "full",
    "positions",
    "prefix_lm",
    "sliding_window",
]
