"""What a function takes from its surroundings: `walk` looks at objects, `reads` at code."""

from __future__ import annotations

from metafocus.closures.walk import LONG, Unseen, closures_of

__all__ = ["LONG", "Unseen", "closures_of"]
