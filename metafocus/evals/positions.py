"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any

from metafocus.errors import DataError


def positions(config: Any) -> int | None:
    """Return the number of positions of a model, or None if its configuration has no limit.

    With YaRN a configuration gives the positions before the extension, so they are multiplied.

    Example:
        >>> from transformers import Qwen2Config
        >>> from metafocus.evals.positions import positions
        >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        >>> positions(Qwen2Config(max_position_embeddings=32768, rope_parameters=yarn))
        131072
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if most is not None and rope.get("rope_type", rope.get("type")) == "yarn":
        original = rope.get("original_max_position_embeddings") or most
        return max(most, int(original * rope.get("factor", 1)))
    return most


def check_positions(size: int, most: int | None, what: str) -> None:
    """Raise if a prompt with its answer has more tokens than the model has positions."""
    if most is not None and size > most:
        raise DataError(
            f"{what} has {size} tokens with its answer, which is more than the {most} positions "
            "of the model: use shorter prompts, or pass max_positions if it was extended (YaRN)."
        )
