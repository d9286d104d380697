"""What the kernels share: where a program works, its rows, and one tile of the attention matrix.

A program has a block of queries (or of keys) of one head in one row of the batch, and walks over
the blocks of keys (or queries) that the spans let it see. In every kernel

    Q, TQ [B, H, S, D], K, TK [B, H / G, S, D], V, TV [B, H / G, S, DV], DO [B, H, S, DV],
    LSE, E and other sums of rows [B, H, S], START, STOP [B, S]

are dense; `SIDE` is the width of a block of queries and of keys; `BD` and `BDV` are `D` and `DV`
rounded up to powers of two; `SUM` is the type of sums, `LOW` the type in which weights, such as
probabilities, enter a product, `PRODUCT` the type of both factors there, and `PRECISION` how
float32 products are taken.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def place(blocks, H):
    """Return block, head and row of the batch of this program."""
    program = tl.program_id(0)
    return program % blocks, program // blocks % H, program // (blocks * H)


@triton.jit
def first_row(x, heads, h, S):
    """Return where head `h` of batch row `x` begins, in rows; int64, or long batches overflow."""
    return (x * heads + h).to(tl.int64) * S


@triton.jit
def rows(X, base, i, S, D: tl.constexpr, BD: tl.constexpr):
    """Load rows `base + i` of `[..., S, D]`; zeros beyond `S` and `D`."""
    d = tl.arange(0, BD)
    there = (i < S)[:, None] & (d < D)[None, :]
    return tl.load(X + base * D + i[:, None] * D + d[None, :], mask=there, other=0.0)


@triton.jit
def put_rows(X, base, i, S, D: tl.constexpr, BD: tl.constexpr, value):
    """Store what `rows` loads."""
    d = tl.arange(0, BD)
    there = (i < S)[:, None] & (d < D)[None, :]
    tl.store(X + base * D + i[:, None] * D + d[None, :], value, mask=there)


@triton.jit
def numbers(X, base, i, S):
    """Load one number a row; zero beyond `S`."""
    return tl.load(X + base + i, mask=i < S, other=0)


@triton.jit
def seen(START, STOP, x, i, j, S):
    """Return which of the queries `i` see which of the keys `j`; none beyond `S`."""
    start, stop = numbers(START, x.to(tl.int64) * S, i, S), numbers(STOP, x.to(tl.int64) * S, i, S)
    return (start[:, None] <= j[None, :]) & (j[None, :] < stop[:, None])


@triton.jit
def dot(a, b, LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """`a b`, summed in float32 at least; both are rounded to `LOW` first."""
    a, b = a.to(LOW).to(PRODUCT), b.to(LOW).to(PRODUCT)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def logits(
    q, k,
    SCALE: tl.constexpr, CAP: tl.constexpr,
    LOW: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`z = scale q k'`, or `cap t` with `t = tanh(scale q k' / cap)`; return z and t."""
    z = dot(q, tl.trans(k), LOW, PRODUCT, PRECISION) * SCALE
    t = z
    if CAP is not None:
        # The exponential takes the absolute value, so that nothing overflows.
        small = tl.exp(tl.abs(z) * (-2.0 / CAP))
        t = (1 - small) / (1 + small)
        t = tl.where(z < 0, -t, t)
        z = t * CAP
    return z, t


@triton.jit
def probabilities(z, lse, allowed):
    """`P = exp(z - lse)` on the keys that are seen, else 0."""
    return tl.exp(tl.where(allowed, z - lse[:, None], -float("inf")))
