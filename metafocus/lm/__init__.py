"""The loss of a causal language model, as a function of fast weights, slow weights and a batch."""

from __future__ import annotations

from metafocus.lm.loss import (
    Adapter,
    Batch,
    LMLoss,
    TokenPolicy,
    all_tokens,
    answer_tokens,
    context_tokens,
    lm_loss,
)

__all__ = [
    "Adapter",
    "Batch",
    "LMLoss",
    "TokenPolicy",
    "all_tokens",
    "answer_tokens",
    "context_tokens",
    "lm_loss",
]
