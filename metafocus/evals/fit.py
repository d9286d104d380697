"""Finds the largest text that fits into a number of tokens."""

from __future__ import annotations

from collections.abc import Callable


def largest(
    size: Callable[[int], int], limit: int, *, least: int = 0, most: int, slack: int = 0
) -> int | None:
    """Return a large n in [least, most] with `size(n) <= limit`, or None if `least` is too much.

    Sizes grow almost linearly in n, so the search uses secants, and every third step halves the
    bracket. The returned n was measured to fit, even if sizes are not exactly monotone. The search
    ends early if a size is within `slack` of the limit.

    Example:
        >>> from metafocus.evals.fit import largest
        >>> largest(lambda n: 10 + 3 * n, 100, most=1000)
        30
    """
    base = size(least)
    if base > limit:
        return None
    low, used, high = least, base, most + 1
    guess, turn = min(least + 16, most), 0
    while high - low > 1 and limit - used > slack:
        found = size(guess)
        if found <= limit:
            low, used = guess, found
        else:
            high = guess
        turn += 1
        slope = (found - base) / max(guess - least, 1)
        ahead = int((limit - used) / slope) if slope > 0 else 2 * low + 16
        guess = (low + high) // 2 if turn % 3 == 0 and high <= most else low + max(ahead, 1)
        guess = min(max(guess, low + 1), high - 1)
    return low
