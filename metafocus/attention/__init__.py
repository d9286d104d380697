"""Attention over spans: memory linear in the length, exact to the second order, in any model."""

from __future__ import annotations

from metafocus.attention.api import span_attention
from metafocus.attention.hugging_face import register
from metafocus.attention.ulysses import ulysses_attention

__all__ = ["register", "span_attention", "ulysses_attention"]
