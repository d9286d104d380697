"""Axes of a comparison: the fields that `over` names, and the settings that they span."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metafocus.checks import is_number, whole
from metafocus.errors import ProblemError
from metafocus.types import Solver

TASKS = "tasks"


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        labels: the value of each axis, as rows and files show it.
        solver: the inner optimiser there.
        estimators: those to compare, by name.
        tasks: how many tasks; None: the episode is one.
    """

    labels: dict[str, Any]
    solver: Solver
    estimators: dict[str, Any]
    tasks: int | None = None


def label(value: Any) -> Any:
    """Return a value of an axis as JSON holds it: numbers and texts as they are, others printed.

    Example:
        >>> label(0.1), label(None), label(label)
        (0.1, 'None', 'label')
    """
    if is_number(value) or isinstance(value, str):
        return value
    return getattr(value, "__name__", None) or repr(value)


def settings(
    over: Mapping[str, Sequence[Any]] | None, solver: Solver, estimators: Mapping[str, Any]
) -> list[Setting]:
    """Return every combination of the values on the axes; without axes, the one setting.

    Raises:
        ProblemError: for a field that nothing has, and for an axis without values.
    """
    axes = _checked(over)
    known = {axis: _resolved(axis, solver, estimators) for axis in axes}
    found = []
    for values in itertools.product(*axes.values()):
        here, parts, tasks = solver, dict(estimators), None
        for axis, value in zip(axes, values, strict=True):
            if axis == TASKS:
                tasks = value
                continue
            target, path = known[axis]
            if target == "solver":
                here = replaced(here, path, value)
            for name in parts:
                if target in ("estimator", name) and has_field(parts[name], path):
                    parts[name] = replaced(parts[name], path, value)
        labels = {axis: label(value) for axis, value in zip(axes, values, strict=True)}
        found.append(Setting(labels, here, parts, tasks))
    return found


def touches_solver(over: Mapping[str, Any] | None, solver: Solver) -> str | None:
    """Return the first axis that changes the solver, or None."""
    return next(
        (a for a in over or {} if _resolved(a, solver, {}, strict=False)[0] == "solver"), None
    )


def has_field(part: Any, path: str) -> bool:
    """Return whether a dataclass has a field, `a.b` for the field `b` of its field `a`."""
    first, _, rest = path.partition(".")
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return False
    if first not in {f.name for f in dataclasses.fields(part)}:
        return False
    return not rest or has_field(getattr(part, first), rest)


def replaced(part: Any, path: str, value: Any) -> Any:
    """Return a dataclass with another value in a field.

    Example:
        >>> import metafocus as mf
        >>> replaced(mf.Implicit(mf.CG(5)), "solve.steps", 3).solve.steps
        3
    """
    first, _, rest = path.partition(".")
    new = replaced(getattr(part, first), rest, value) if rest else value
    return dataclasses.replace(part, **{first: new})


def _checked(over: Any) -> dict[str, list[Any]]:
    if over is None:
        return {}
    form = "over must be a dict of lists, such as {'solver.steps': [1, 2, 4]}"
    if not isinstance(over, Mapping):
        raise ProblemError(f"{form}, got {type(over).__name__}.")
    # Arrays and tensors, such as np.linspace(...), become lists of Python's numbers.
    over = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in over.items()}
    for axis, values in over.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ProblemError(f"{form}; {axis!r} has {values!r}.")
        labels = [label(value) for value in values]
        twice = [x for i, x in enumerate(labels) if x in labels[:i]]
        if twice:
            raise ProblemError(f"over: {axis!r} has {twice[0]!r} twice.")
        if axis == TASKS:
            for value in values:
                whole("tasks", value, 1, error=ProblemError)
    return {axis: list(values) for axis, values in over.items()}


def _resolved(
    axis: str, solver: Solver, estimators: Mapping[str, Any], *, strict: bool = True
) -> tuple[str, str]:
    """Return what an axis changes, `solver`, `estimator` or a name, and the path of the field."""
    if axis == TASKS:
        return TASKS, ""
    first, _, rest = axis.partition(".")
    if first == "solver" and has_field(solver, rest):
        return "solver", rest
    if first == "estimator" and any(has_field(e, rest) for e in estimators.values()):
        return "estimator", rest
    for name, part in estimators.items():
        if axis.startswith(f"{name}.") and has_field(part, axis[len(name) + 1 :]):
            return name, axis[len(name) + 1 :]
    if has_field(solver, axis):
        return "solver", axis
    if any(has_field(e, axis) for e in estimators.values()):
        return "estimator", axis
    if not strict:
        return "", ""
    fields = [f"solver.{f}" for f in _fields(solver)]
    fields += sorted({f"estimator.{f}" for e in estimators.values() for f in _fields(e)})
    raise ProblemError(
        f"over: nothing has the field {axis!r}. Use tasks, or one of {', '.join(fields)}, also "
        "with the name of an estimator in place of 'estimator'."
    )


def _fields(part: Any, depth: int = 2) -> list[str]:
    if depth == 0 or not dataclasses.is_dataclass(part):
        return []
    found = []
    for f in dataclasses.fields(part):
        found += [f.name, *(f"{f.name}.{x}" for x in _fields(getattr(part, f.name), depth - 1))]
    return found
