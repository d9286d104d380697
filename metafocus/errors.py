"""Errors and warnings: each text names the argument, its value and the fix."""

from __future__ import annotations


class MetafocusError(ValueError):
    """Base of every error that a wrong argument or a wrong input raises."""


class ProblemError(MetafocusError):
    """A bilevel problem that is ill-posed: shapes, keys or dtypes that do not fit together."""


class ClosureError(ProblemError):
    """A loss uses a tensor that needs a derivative and that the estimator cannot see."""


class NonFiniteError(MetafocusError):
    """An inner loss is NaN or infinite."""


class TransformError(MetafocusError):
    """A composition of function transforms that would be silently wrong."""


class PlacementError(MetafocusError):
    """A placement that matches no module, or modules that an adapter cannot wrap."""


class DataError(MetafocusError):
    """A data file, a chat or a batch that cannot be used as it is."""


class NotStationaryWarning(UserWarning):
    """An implicit estimate is taken where the inner gradient is not small."""


class NotConvergedWarning(NotStationaryWarning):
    """The linear system of an implicit estimate has no solution, or its series did not converge."""


class NotSmoothWarning(UserWarning):
    """A metagradient of a training run that says little about moves of the outer parameters."""


class PrecisionWarning(UserWarning):
    """A half type holds too few digits for a computation."""


class RebuiltWarning(UserWarning):
    """The same meta loss is built again and again, and its checks run each time."""


class ChangedWarning(UserWarning):
    """A result that was kept is of other code than the function has now."""


class RecompiledWarning(UserWarning):
    """A compiled hypergradient is compiled again and again, for ever new shapes or constants."""


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error of another package, or the name of its class.

    Example:
        >>> first_line(KeyError()), first_line(ValueError("no such file\nTraceback ..."))
        ('KeyError', 'no such file')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
