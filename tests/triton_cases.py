"""Triton's attention in its interpreter on a CPU: each case gives the errors of what it compares.

A script, since the interpreter is chosen when triton is imported: `tests/test_triton.py` runs it
with TRITON_INTERPRET=1 and the names of cases, and says how large the errors may be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from models import relative
from test_attention import OPTIONS, D, error, inputs, loss, policies, random_spans, second, tiny
from torch.func import grad, jvp, vmap

from metafocus.attention import span_attention
from metafocus.attention.kernels import auto
from metafocus.attention.kernels.complete import every_derivative
from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.tiled import Tiled
from metafocus.attention.kernels.triton.launch import Triton
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans
from metafocus.torch_internals import pytree

S, HEADS = 24, (2, 1)
ARGS = (0, 1, 2)
# Two blocks, the second one not full.
auto.KERNELS["triton"] = partial(Triton, side=16)


def by_tape(backend, spans, args) -> list[list[torch.Tensor]]:
    """Value, gradient and second derivative."""
    args = [x.requires_grad_() for x in args]
    value = loss(spans, backend)(*args)
    first = torch.autograd.grad(value, args, create_graph=True)
    return [[value], first, torch.autograd.grad(sum((g * g.sin()).sum() for g in first), args)]


def by_transforms(backend, spans, args, way, **options) -> list[list[torch.Tensor]]:
    """The second derivative, forward mode, and forward mode of and inside reverse mode."""
    f = loss(spans, backend, **options)
    return [
        list(second(f)(*args)),
        [jvp(f, args, way)[1]],
        list(jvp(grad(f, ARGS), args, way)[1]),
        list(grad(lambda *a: jvp(f, a, way)[1], ARGS)(*args)),
    ]


def spans_against_dense(spans, heads=HEADS, width=3) -> list[float]:
    args = inputs(0, S, heads=heads, width=width)
    both = (by_tape(backend, spans, args) for backend in ("triton", "dense"))
    return [error(got, want) for got, want in zip(*both, strict=True)]


def options_against_dense(options) -> list[float]:
    if "sinks" in options:
        options = {**options, "sinks": options["sinks"][: HEADS[0]]}
    args, way = (inputs(seed, S, heads=HEADS) for seed in (0, 1))
    spans = random_spans(1, S)
    both = (by_transforms(name, spans, args, way, **options) for name in ("triton", "dense"))
    return [error(got, want) for got, want in zip(*both, strict=True)]


def in_type(dtype, softcap) -> dict[str, list[float]]:
    """Errors of all raw computations against tiles in float64, of Triton and of tiles."""
    spans, scaling = random_spans(3, S), Scaling(D**-0.5, softcap)
    inside, along, other = (inputs(seed, S, dtype, heads=HEADS) for seed in range(3))
    do = other[0][..., :3]
    dl = torch.randn(2, HEADS[0], S, generator=torch.Generator().manual_seed(0))
    args = QKV(*inside), QKV(*along), do, dl
    exact = pytree.tree_map(torch.Tensor.double, args)
    want = every_derivative(Tiled(), spans, scaling, *exact)
    return {
        type(kernel).__name__: [
            relative(x.double(), y)
            for x, y in zip(every_derivative(kernel, spans, scaling, *args), want, strict=True)
        ]
        for kernel in (Triton(side=16), Tiled())
    }


def mapped() -> list[float]:
    """Over inputs and spans, of a second derivative."""
    many = [torch.stack(x) for x in zip(*(inputs(s, S, heads=HEADS) for s in (0, 1)), strict=True)]
    starts, stops = (torch.stack([x, x.flip(0)]) for x in random_spans(4, S))

    def one(backend):
        return lambda q, k, v, *spans: second(loss(Spans(*spans), backend))(q, k, v)

    got, want = (vmap(one(backend))(*many, starts, stops) for backend in ("triton", "dense"))
    return [error(got, want)]


def numerically() -> bool:
    def attend(*args):
        return span_attention(*args, random_spans(5, 6, rows=1), backend="triton", softcap=1.3)

    args = tiny()
    return torch.autograd.gradcheck(
        attend, args, check_forward_ad=True, fast_mode=True
    ) and torch.autograd.gradgradcheck(attend, args, check_fwd_over_rev=True, fast_mode=True)


def beyond() -> str:
    q = torch.randn(1, 1, 3, 4)
    try:
        spans = Spans(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 2, 4]]))
        span_attention(q, q, q, spans, backend="triton")
    except ProblemError as said:
        return str(said)
    return "no error"


CASES: dict[str, Callable[[], Any]] = {
    **{name: partial(spans_against_dense, spans) for name, spans in policies(S).items()},
    "no groups": partial(spans_against_dense, random_spans(2, S), (2, 2)),
    "three heads for one": partial(spans_against_dense, random_spans(2, S), (3, 1)),
    "wide values": partial(spans_against_dense, random_spans(2, S), width=17),
    **{f"option {k}": partial(options_against_dense, x) for k, x in OPTIONS.items()},
    "float32": partial(in_type, torch.float32, 1.3),
    "float16": partial(in_type, torch.float16, None),
    "bfloat16": partial(in_type, torch.bfloat16, 1.3),
    "vmap": mapped,
    "gradgradcheck": numerically,
    "beyond": beyond,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: CASES[name]() for name in sys.argv[1:] or CASES}, sys.stdout)
