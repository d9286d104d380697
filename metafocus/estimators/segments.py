"""How the steps of an inner loop are cut into segments that are rebuilt one at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.rng import kept
from metafocus.solvers.descent import segment
from metafocus.torch_internals import storage_key, transforming
from metafocus.types import InnerLoss, Params, Solver, State


def cut(steps: range, size: int) -> list[range]:
    """Return the steps in pieces of `size`; a shorter one comes first, as it is rebuilt."""
    ends = list(range(steps.stop, steps.start, -size))[::-1]
    return [range(max(end - size, steps.start), end) for end in ends]


def best_size(
    loss: InnerLoss,
    solver: Solver,
    steps: range,
    params: Params,
    state: State,
    outer: Params,
    support: Any,
) -> int:
    """Return the size of segments with the smallest peak memory, by one step that is measured.

    `K / k` states and the graphs of `k` steps are kept at a time; their sum is smallest at
    `k = sqrt(K * bytes of a state / bytes of a graph)`. Where it cannot be measured: 1, that is
    inside transforms, and for a loss with `torch.func` in it, which refuses hooks on saved tensors.
    """
    if transforming() or not torch.is_grad_enabled():
        return 1
    one = steps[:1]
    at = pt.detach((params, state, outer, streams.part(support, one)))
    inputs, rebuild = pt.partition(at)
    leaves = [x.detach().requires_grad_(pt.is_differentiable(x)) for x in inputs]
    held = {storage_key(x.untyped_storage()) for x in leaves}
    graph: dict[int, int] = {}

    def seen(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage_key(storage) not in held:
            graph[storage_key(storage)] = storage.nbytes()
        return x

    try:
        with kept(inputs), torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
            # The results live until the graph is counted: memory that is freed is used again.
            results = segment(loss, solver, one)(*rebuild(leaves))
    except RuntimeError:
        return 1
    own = sum(x.untyped_storage().nbytes() for x in pt.tensors(at[:2]))
    size = math.sqrt(len(steps) * own / max(sum(graph.values()), 1))
    del results
    return min(max(round(size), 1), len(steps))
