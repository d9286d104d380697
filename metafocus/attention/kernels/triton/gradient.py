"""Attention and its gradient: online softmax, then the gradient from saved logsumexps.

References:
    Dao, "FlashAttention-2", ICLR 2024.
"""

# What runs on a device has types of Triton's own.
# pyright: reportGeneralTypeIssues=false

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from metafocus.attention.kernels.triton.tile import (
    dot,
    first_row,
    logits,
    numbers,
    place,
    probabilities,
    put_rows,
    rows,
    seen,
)


@triton.jit
def attend(
    Q, K, V, START, STOP, LOW_KEY, HIGH_KEY, OUT, LSE, S, H, blocks,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SIDE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, SUM: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`lse = log sum_j exp(z_j)`, `o = sum_j exp(z_j - lse) v_j`, for a block of queries.

    `top` is the largest logit so far and the sums are of `exp(z - top)`: when it grows to `new`,
    they are multiplied by `exp(top - new)`. A row without keys gets 0 and 0.
    """
    b, h, x = place(blocks, H)
    query, key = first_row(x, H, h, S), first_row(x, H // G, h // G, S)
    i = b * SIDE + tl.arange(0, SIDE)
    q = rows(Q, query, i, S, D, BD)
    top = tl.full([SIDE], -float("inf"), SUM)
    total, out = tl.zeros([SIDE], SUM), tl.zeros([SIDE, BDV], SUM)
    for first in range(tl.load(LOW_KEY + x * blocks + b), tl.load(HIGH_KEY + x * blocks + b), SIDE):
        j = first + tl.arange(0, SIDE)
        z, _ = logits(q, rows(K, key, j, S, D, BD), SCALE, CAP, LOW, PRODUCT, PRECISION)
        z = tl.where(seen(START, STOP, x, i, j, S), z, -float("inf"))
        new = tl.maximum(top, tl.max(z, 1))
        # A row that has seen no key yet would subtract infinities.
        finite = tl.where(new == -float("inf"), 0.0, new)
        p, old = tl.exp(z - finite[:, None]), tl.exp(top - finite)
        total = total * old + tl.sum(p, 1)
        out = out * old[:, None] + dot(p, rows(V, key, j, S, DV, BDV), LOW, PRODUCT, PRECISION)
        top = new
    none = total == 0
    total = tl.where(none, 1.0, total)
    put_rows(OUT, query, i, S, DV, BDV, out / total[:, None])
    tl.store(LSE + query + i, tl.where(none, 0.0, top + tl.log(total)), mask=i < S)


@triton.jit
def slopes(
    q, k, v, do, lse, e, allowed,
    SCALE: tl.constexpr, CAP: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`P`, and `dU = z' P (dP - E)` with `dP = do v'` and `z' = 1 - t^2` under a soft cap."""
    z, t = logits(q, k, SCALE, CAP, LOW, PRODUCT, PRECISION)
    p = probabilities(z, lse, allowed)
    du = p * (dot(do, tl.trans(v), LOW, PRODUCT, PRECISION) - e[:, None])
    if CAP is not None:
        du *= 1 - t * t
    return p, du


@triton.jit
def query_gradient(
    Q, K, V, DO, LSE, E, START, STOP, LOW_KEY, HIGH_KEY, GQ, S, H, blocks,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SIDE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, SUM: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq = scale dU k`, for a block of queries; `E = rowsum(do o) - dl`."""
    b, h, x = place(blocks, H)
    query, key = first_row(x, H, h, S), first_row(x, H // G, h // G, S)
    i = b * SIDE + tl.arange(0, SIDE)
    q, do = rows(Q, query, i, S, D, BD), rows(DO, query, i, S, DV, BDV)
    lse, e = numbers(LSE, query, i, S), numbers(E, query, i, S)
    dq = tl.zeros([SIDE, BD], SUM)
    for first in range(tl.load(LOW_KEY + x * blocks + b), tl.load(HIGH_KEY + x * blocks + b), SIDE):
        j = first + tl.arange(0, SIDE)
        k, v = rows(K, key, j, S, D, BD), rows(V, key, j, S, DV, BDV)
        allowed = seen(START, STOP, x, i, j, S)
        _, du = slopes(q, k, v, do, lse, e, allowed, SCALE, CAP, LOW, PRODUCT, PRECISION)
        dq += dot(du, k, LOW, PRODUCT, PRECISION)
    put_rows(GQ, query, i, S, D, BD, dq * SCALE)


@triton.jit
def key_gradient(
    Q, K, V, DO, LSE, E, START, STOP, LOW_QUERY, HIGH_QUERY, GK, GV, S, H, blocks,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SIDE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, SUM: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk = scale dU' q`, `dv = P' do`, for a block of keys; sums over the heads of the group."""
    b, h, x = place(blocks, H // G)
    key = first_row(x, H // G, h, S)
    j = b * SIDE + tl.arange(0, SIDE)
    k, v = rows(K, key, j, S, D, BD), rows(V, key, j, S, DV, BDV)
    dk, dv = tl.zeros([SIDE, BD], SUM), tl.zeros([SIDE, BDV], SUM)
    low, high = tl.load(LOW_QUERY + x * blocks + b), tl.load(HIGH_QUERY + x * blocks + b)
    for member in range(G):
        query = first_row(x, H, h * G + member, S)
        for first in range(low, high, SIDE):
            i = first + tl.arange(0, SIDE)
            q, do = rows(Q, query, i, S, D, BD), rows(DO, query, i, S, DV, BDV)
            lse, e = numbers(LSE, query, i, S), numbers(E, query, i, S)
            allowed = seen(START, STOP, x, i, j, S)
            p, du = slopes(q, k, v, do, lse, e, allowed, SCALE, CAP, LOW, PRODUCT, PRECISION)
            dk += dot(tl.trans(du), q, LOW, PRODUCT, PRECISION)
            dv += dot(tl.trans(p), do, LOW, PRODUCT, PRECISION)
    put_rows(GK, key, j, S, D, BD, dk * SCALE)
    put_rows(GV, key, j, S, DV, BDV, dv)
