"""The unbiased estimate of pass@k."""

from __future__ import annotations

import math

from metafocus.errors import DataError


def pass_at_k(n: int, correct: int, k: int) -> float:
    r"""Return the probability that k of n samples, drawn without replacement, hold a correct one.

    .. math:: 1 - \binom{n-c}{k} / \binom{n}{k}

    Its mean over sets of n samples is the probability that at least one of k new samples is
    correct, which `1 - (1 - c/n)^k` underestimates. (Chen et al., 2021, arXiv 2107.03374.)

    Args:
        n: the number of samples of the question.
        correct: the number of correct samples.
        k: the number of samples that are drawn.

    Raises:
        DataError: unless `0 <= correct <= n` and `1 <= k <= n`.

    Example:
        >>> from metafocus.evals.agentic import pass_at_k
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
        (0.25, 0.5, 1.0)
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise DataError(f"n={n}, correct={correct}, k={k}: needs 0 <= correct <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
