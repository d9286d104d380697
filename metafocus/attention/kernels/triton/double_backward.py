"""Forward mode, and the gradient of the gradient, in three passes and without atomics.

With the tangents `tq, tk, tv` of the inputs, and `P`, `t`, `z'`, `dP - E` of the gradient,

    Ut = scale (tq k' + q tk'),  Zt = z' Ut,  mu = rowsum(P Zt),  Pt = P (Zt - mu)

is forward mode: `mu` is the tangent of the logsumexp, `Pt` that of `P`, and `Pt v + P tv` that of
the output. The second derivative is derived in `tiled.py`.
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
def moved(
    q, k, tq, tk, lse, allowed,
    SCALE: tl.constexpr, CAP: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `P`, `Ut`, `Zt` and `t` of a tile."""
    z, t = logits(q, k, SCALE, CAP, LOW, PRODUCT, PRECISION)
    ut = dot(tq, tl.trans(k), LOW, PRODUCT, PRECISION)
    ut = (ut + dot(q, tl.trans(tk), LOW, PRODUCT, PRECISION)) * SCALE
    zt = ut
    if CAP is not None:
        zt *= 1 - t * t
    return probabilities(z, lse, allowed), ut, zt, t


@triton.jit
def curvature(p, ut, pt, t, spread, w, c, CAP: tl.constexpr):
    """Return `Ru` and `dU` of a tile from `Pt`, `spread = dP - E`, `w = do tv'` and row sums `c`.

    `R = Pt (dP - E) + P (w - c)`, `Ru = z' R + z'' Ut P (dP - E)` with `z' = 1 - t^2` and
    `z'' = -2 t z' / cap`, and `dU = z' P (dP - E)`.
    """
    r, du = pt * spread + p * (w - c[:, None]), p * spread
    if CAP is not None:
        slope = 1 - t * t
        r = slope * (r - (2.0 / CAP) * t * ut * du)
        du *= slope
    return r, du


@triton.jit
def row_sums(
    Q, K, V, TQ, TK, TV, DO, LSE, E, START, STOP, LOW_KEY, HIGH_KEY, MU, C, S, H, blocks,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SIDE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, SUM: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`mu = rowsum(P Zt)`, and `c = rowsum(Pt (dP - E) + P w)` where `DO` is given, else only `mu`.

    `Pt` needs `mu` of the whole row, so `c` is taken as
    `rowsum(P [Zt (dP - E) + w]) - mu rowsum(P (dP - E))`.
    """
    b, h, x = place(blocks, H)
    query, key = first_row(x, H, h, S), first_row(x, H // G, h // G, S)
    i = b * SIDE + tl.arange(0, SIDE)
    q, tq = rows(Q, query, i, S, D, BD), rows(TQ, query, i, S, D, BD)
    lse = numbers(LSE, query, i, S)
    if DO is not None:
        do, e = rows(DO, query, i, S, DV, BDV), numbers(E, query, i, S)
    mu, c, net = tl.zeros([SIDE], SUM), tl.zeros([SIDE], SUM), tl.zeros([SIDE], SUM)
    for first in range(tl.load(LOW_KEY + x * blocks + b), tl.load(HIGH_KEY + x * blocks + b), SIDE):
        j = first + tl.arange(0, SIDE)
        k, tk = rows(K, key, j, S, D, BD), rows(TK, key, j, S, D, BD)
        allowed = seen(START, STOP, x, i, j, S)
        p, _, zt, _ = moved(q, k, tq, tk, lse, allowed, SCALE, CAP, LOW, PRODUCT, PRECISION)
        mu += tl.sum(p * zt, 1)
        if DO is not None:
            v, tv = rows(V, key, j, S, DV, BDV), rows(TV, key, j, S, DV, BDV)
            spread = dot(do, tl.trans(v), LOW, PRODUCT, PRECISION) - e[:, None]
            c += tl.sum(p * (zt * spread + dot(do, tl.trans(tv), LOW, PRODUCT, PRECISION)), 1)
            net += tl.sum(p * spread, 1)
    tl.store(MU + query + i, mu, mask=i < S)
    if DO is not None:
        tl.store(C + query + i, c - mu * net, mask=i < S)


@triton.jit
def query_second(
    Q, K, V, TQ, TK, TV, DO, LSE, E, MU, C, START, STOP, LOW_KEY, HIGH_KEY, OT, RQ, S, H, blocks,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SIDE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, SUM: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`ot = Pt v + P tv`, and `rq = scale (Ru k + dU tk)` where `DO` is given: queries' block."""
    b, h, x = place(blocks, H)
    query, key = first_row(x, H, h, S), first_row(x, H // G, h // G, S)
    i = b * SIDE + tl.arange(0, SIDE)
    q, tq = rows(Q, query, i, S, D, BD), rows(TQ, query, i, S, D, BD)
    lse, mu = numbers(LSE, query, i, S), numbers(MU, query, i, S)
    if DO is not None:
        do, e, c = rows(DO, query, i, S, DV, BDV), numbers(E, query, i, S), numbers(C, query, i, S)
    ot, rq = tl.zeros([SIDE, BDV], SUM), tl.zeros([SIDE, BD], SUM)
    for first in range(tl.load(LOW_KEY + x * blocks + b), tl.load(HIGH_KEY + x * blocks + b), SIDE):
        j = first + tl.arange(0, SIDE)
        k, tk = rows(K, key, j, S, D, BD), rows(TK, key, j, S, D, BD)
        v, tv = rows(V, key, j, S, DV, BDV), rows(TV, key, j, S, DV, BDV)
        allowed = seen(START, STOP, x, i, j, S)
        p, ut, zt, t = moved(q, k, tq, tk, lse, allowed, SCALE, CAP, LOW, PRODUCT, PRECISION)
        pt = p * (zt - mu[:, None])
        ot += dot(pt, v, LOW, PRODUCT, PRECISION) + dot(p, tv, LOW, PRODUCT, PRECISION)
        if DO is not None:
            spread = dot(do, tl.trans(v), LOW, PRODUCT, PRECISION) - e[:, None]
            w = dot(do, tl.trans(tv), LOW, PRODUCT, PRECISION)
            ru, du = curvature(p, ut, pt, t, spread, w, c, CAP)
            rq += dot(ru, k, LOW, PRODUCT, PRECISION) + dot(du, tk, LOW, PRODUCT, PRECISION)
    put_rows(OT, query, i, S, DV, BDV, ot)
    if DO is not None:
        put_rows(RQ, query, i, S, D, BD, rq * SCALE)


@triton.jit
def key_second(
    Q, K, V, TQ, TK, TV, DO, LSE, E, MU, C, START, STOP, LOW_QUERY, HIGH_QUERY, RK, RV, S, H,
    blocks, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, SIDE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    SUM: tl.constexpr, LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`rk = scale (Ru' q + dU' tq)`, `rv = Pt' do`: a block of keys, all heads of its group."""
    b, h, x = place(blocks, H // G)
    key = first_row(x, H // G, h, S)
    j = b * SIDE + tl.arange(0, SIDE)
    k, tk = rows(K, key, j, S, D, BD), rows(TK, key, j, S, D, BD)
    v, tv = rows(V, key, j, S, DV, BDV), rows(TV, key, j, S, DV, BDV)
    rk, rv = tl.zeros([SIDE, BD], SUM), tl.zeros([SIDE, BDV], SUM)
    low, high = tl.load(LOW_QUERY + x * blocks + b), tl.load(HIGH_QUERY + x * blocks + b)
    for member in range(G):
        query = first_row(x, H, h * G + member, S)
        for first in range(low, high, SIDE):
            i = first + tl.arange(0, SIDE)
            q, tq = rows(Q, query, i, S, D, BD), rows(TQ, query, i, S, D, BD)
            do, e = rows(DO, query, i, S, DV, BDV), numbers(E, query, i, S)
            lse, mu, c = (
                numbers(LSE, query, i, S),
                numbers(MU, query, i, S),
                numbers(C, query, i, S),
            )
            allowed = seen(START, STOP, x, i, j, S)
            p, ut, zt, t = moved(q, k, tq, tk, lse, allowed, SCALE, CAP, LOW, PRODUCT, PRECISION)
            spread = dot(do, tl.trans(v), LOW, PRODUCT, PRECISION) - e[:, None]
            w = dot(do, tl.trans(tv), LOW, PRODUCT, PRECISION)
            pt = p * (zt - mu[:, None])
            ru, du = curvature(p, ut, pt, t, spread, w, c, CAP)
            rk += dot(tl.trans(ru), q, LOW, PRODUCT, PRECISION)
            rk += dot(tl.trans(du), tq, LOW, PRODUCT, PRECISION)
            rv += dot(tl.trans(pt), do, LOW, PRODUCT, PRECISION)
    put_rows(RK, key, j, S, D, BD, rk * SCALE)
    put_rows(RV, key, j, S, DV, BDV, rv)
