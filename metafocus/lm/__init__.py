"""The loss of a causal language model, as a function of fast weights, slow weights and a batch."""

from __future__ import annotations

from metafocus.adapters.protocol import Adapter
from metafocus.lm.generation import prefilled
from metafocus.lm.loss import LMLoss, lm_loss
from metafocus.lm.tokens import TokenPolicy, all_tokens, answer_tokens, context_tokens
from metafocus.masks import Batch

__all__ = [
    "Adapter",
    "Batch",
    "LMLoss",
    "TokenPolicy",
    "all_tokens",
    "answer_tokens",
    "context_tokens",
    "lm_loss",
    "prefilled",
]
