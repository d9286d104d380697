"""A comparison as a table for a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metafocus.comparison.averages import of_seeds

_KEYS = ("relative_error", "cosine", "norm_ratio", "seconds")
_SPECIAL = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"}}


def latex(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """Return rows as LaTeX in the style of the package booktabs."""
    heads = [*axes, "estimator", "error", "cosine", "norm", "seconds", "MB", "verdict"]
    columns = "l" * len(axes) + "lrrrrrl"
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _line(map(text, heads)), r"\midrule"]
    before = None
    for row in rows:
        here = [text(row[axis]) for axis in axes]
        if before not in (None, here):
            lines.append(r"\addlinespace")
        # A value is written once, where its rows begin.
        shown = [""] * len(here) if here == before else here
        before = here
        peak = row["peak_bytes"]
        memory = "--" if peak is None else _digits(peak / 2**20, 2)
        error, *numbers = [_number(row, key) for key in _KEYS]
        numbers = [error + of_seeds(row), *numbers]
        lines.append(_line([*shown, text(row["name"]), *numbers, memory, text(row["verdict"])]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def text(value: Any) -> str:
    """Return a text as LaTeX prints it, character by character."""
    return "".join(_SPECIAL.get(c, c) for c in str(value))


def _line(cells: Any) -> str:
    return " & ".join(cells) + r" \\"


def _number(row: Mapping[str, Any], key: str) -> str:
    value, low, high = (row.get(k) for k in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return "--"
    mean = f"{value:.3f}" if key == "cosine" else _digits(value, 3 if key == "norm_ratio" else 2)
    if low is None or high is None or high - low <= 1e-9 * abs(value):
        return mean
    return f"{mean} [{_digits(low, 2)}, {_digits(high, 2)}]"


def _digits(value: float, count: int) -> str:
    """Return a number to some digits; very small and very large ones as a power of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:#.{count}g}".rstrip(".") if count == 3 else f"{value:.{count}g}"
    mantissa, exponent = f"{value:.{count - 1}e}".split("e")
    return rf"${mantissa}\times 10^{{{int(exponent)}}}$"
