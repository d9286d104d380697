"""The parts of a call in words, written down for `mf.explain`."""

from __future__ import annotations

from typing import Any

from metafocus import params as pt
from metafocus import streams
from metafocus.calls import note
from metafocus.types import Params, Solver


def note_parts(
    solver: Solver,
    estimator: Any,
    path: Any,
    start: Params,
    outer: Params,
    support: Any,
    query: Any,
) -> None:
    """Write down what one meta loss is made of."""
    explicit = getattr(estimator, "explicit", False)
    sees = "explicit tensors only" if explicit else "all that the tape records"
    order = "second" if getattr(estimator, "twice", True) else "first"
    name = getattr(estimator, "__name__", None) or str(estimator)
    note("estimator", f"{name}: differentiates {sees}; takes {order} derivatives of the inner loss")
    note("inner solver", str(solver))
    if path is not None:
        note("path", "the outer loss counts after each inner step, with weights of its own")
    note("fast weights", tensors(list(start.values())))
    moving = sum(v.requires_grad for v in outer.values())
    count = f"; {moving} of them require grad" if outer else ": what the losses close over"
    note("outer parameters", tensors(list(outer.values())) + count)
    note("support", data(support))
    note("query", data(query))


def tensors(found: list[Any]) -> str:
    """Return number, size and types of some tensors."""
    size = f"{len(found)} tensors of {sum(x.numel() for x in found):,} numbers"
    kinds = sorted({f"{str(x.dtype).removeprefix('torch.')} on {x.device}" for x in found})
    return ", ".join([size, *kinds])


def data(tree: Any) -> str:
    """Return what the inner steps see of a support, or the outer loss of a query."""
    if isinstance(tree, streams.Shared):
        return f"a stream that all tasks share: {data(tree.stream)}"
    if isinstance(tree, streams.PerStep):
        return f"PerStep: a slice for each step, {tensors(pt.tensors(tree))}"
    if isinstance(tree, streams.Zipped):
        return "several streams side by side: " + "; ".join(map(data, tree.streams))
    if streams.is_stream(tree):
        return f"a stream of type {type(tree).__name__}: asked for data at each step"
    return f"the same at each step, {tensors(pt.tensors(tree))}"
