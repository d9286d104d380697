"""Confidence intervals of a measured share."""

from __future__ import annotations

import math
from statistics import NormalDist

from metafocus.errors import DataError


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Return the Wilson score interval of a share of n trials.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    If scores may also lie between 0 and 1, p(1 - p) is the largest possible variance for their
    mean. The interval is then too wide rather than too narrow.

    Raises:
        DataError: if the share is outside [0, 1], if there are no trials, or if the confidence is
            outside (0, 1).

    Example:
        >>> from metafocus.evals.intervals import wilson
        >>> [round(edge, 4) for edge in wilson(0.5, 10)]
        [0.2366, 0.7634]
    """
    if not 0 <= share <= 1 or n < 1 or not 0 < confidence < 1:
        raise DataError(
            f"share={share}, n={n}, confidence={confidence}: give 0 <= share <= 1, n >= 1 and "
            "0 < confidence < 1"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and 1 the bound is exactly 0 or 1, but floating point gives another value.
    low = 0.0 if share == 0 else (middle - reach) / scale
    high = 1.0 if share == 1 else (middle + reach) / scale
    return max(low, 0.0), min(high, 1.0)
