"""Settings of optimisers, checked when they are made."""

from __future__ import annotations

from metafocus.solvers.rates import Rate, per_step


def check_common(lr: Rate, steps: int, weight_decay: float) -> None:
    """Raise for an argument of every optimiser that is out of its range."""
    if not callable(lr) and not isinstance(lr, per_step) and not lr >= 0:
        raise ValueError(
            f"lr must be a number >= 0 or a function of the outer parameters, got {lr}."
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0 (0: no adaptation), got {steps!r}.")
    not_negative("weight_decay", weight_decay)


def not_negative(name: str, value: float) -> None:
    """Raise unless `value >= 0`."""
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}.")


def positive(name: str, value: float) -> None:
    """Raise unless `value > 0`."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")


def fraction(name: str, value: float) -> None:
    """Raise unless `0 <= value < 1`."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")
