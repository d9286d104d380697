"""Cross entropy of a linear head, a chunk of positions at a time: no logits of all positions.

There are three forms of one value. On the tape, the first derivative is computed in the forward
pass, while the logits of a chunk exist; under function transforms each chunk is recomputed for a
derivative; a compiler gets plain operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metafocus.autodiff import grad as derivatives
from metafocus.autodiff.recompute import recompute
from metafocus.errors import ProblemError
from metafocus.lm.cross_entropy import IGNORED, LogitHead, chunk_grads, chunk_loss
from metafocus.precision import as_autocast, no_autocast, wide, wide_type
from metafocus.torch_internals import is_tracked, transforming


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_head: LogitHead = LogitHead(),  # noqa: B008 - frozen, so it can be shared
    chunk: int | None = None,
) -> Tensor:
    """Return the sum of the cross entropies of a linear head, in memory `O(chunk * V)`.

    `loss = sum_i [y_i != -100] (logsumexp_v z_iv - z_iy_i)` with `z = logit_head(h W' + b)`.
    Softmax and sum are in float32, or in float64 for float64. Exact in every order and mode of
    differentiation; the logits of all positions never exist at once up to the second derivative
    (under `torch.func.grad` and with `create_graph`: up to the first).

    Args:
        hidden: `h`, `[N, D]`.
        weight: `W`, `[V, D]`.
        targets: `y`, int64 `[N]`; -100 where a position is not scored.
        bias: `b`, `[V]`.
        logit_head: what follows the linear map.
        chunk: rows at a time; default about 4 million logits, on a GPU as many rows as `D`, and
            at least 128 rows.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ProblemError: for shapes that do not fit together, or a chunk below 1.

    Example:
        >>> h, w = torch.eye(2), torch.zeros(4, 2)
        >>> token_loss(h, w, torch.tensor([3, -100]))
        tensor(1.3863)
    """
    _check(hidden, weight, targets, bias, chunk)
    rows = chunk or _rows(weight.shape[0], weight.shape[1], hidden.is_cuda)
    # Casts as F.linear would; what follows runs in the types that it is given, in every pass.
    hidden, weight, *rest = as_autocast(hidden, weight, *([] if bias is None else [bias]))
    bias = rest[0] if rest else None
    with no_autocast(hidden.device):
        if transforming():
            return _recomputed(logit_head, rows, hidden, weight, bias, targets)
        inputs = (hidden, weight, bias)
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
        if any(wanted):
            return _TokenLoss.apply(logit_head, rows, wanted, *inputs, targets)[0]  # pyright: ignore
        return _sweep(logit_head, rows, wanted, *inputs, targets)[0]


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk: int | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ProblemError(
            "token_loss needs hidden [N, D] and weight [V, D], got "
            f"{list(hidden.shape)} and {list(weight.shape)}. Flatten batch and positions first."
        )
    if targets.shape != hidden.shape[:1]:
        raise ProblemError(
            f"token_loss needs one target per row of hidden, {[len(hidden)]}, got "
            f"{list(targets.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ProblemError(
            f"token_loss needs bias of shape {[len(weight)]}, got {list(bias.shape)}."
        )
    if chunk is not None and chunk < 1:
        raise ProblemError(f"token_loss needs chunk >= 1 or None, got {chunk}.")


def _rows(vocabulary: int, width: int, gpu: bool) -> int:
    # On a GPU a chunk has as many rows as the weight has columns: its logits are as large as the
    # weight, and
    # adding a chunk's share to its gradient costs little beside the chunk's products.
    return max(width if gpu else (1 << 22) // vocabulary, 128)


def _recomputed(
    logit_head: LogitHead, rows: int, h: Tensor, w: Tensor, b: Tensor | None, y: Tensor
) -> Tensor:
    chunks = zip(h.split(rows), y.split(rows), strict=True)
    if torch.compiler.is_compiling():
        return _total([chunk_loss(logit_head, part, w, b, target) for part, target in chunks])
    wanted = [x is not None and is_tracked(x) for x in (h, w, b)]

    def pullback(args: tuple[Any, ...], cotangent: Tensor) -> tuple[Any, ...]:
        found = iter(recompute(partial(chunk_grads, logit_head, wanted), *args, cotangent))
        return *(next(found) if wants else None for wants in wanted), None

    loss = partial(chunk_loss, logit_head)
    return _total(
        [recompute(loss, part, w, b, target, pullback=pullback) for part, target in chunks]
    )


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _sweep(
    logit_head: LogitHead,
    rows: int,
    wanted: list[bool],
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and its gradients by `h`, `w`, `b`, None where not wanted; no graph."""
    chunks = list(zip(h.split(rows), y.split(rows), strict=True))
    totals: list[Tensor] = []
    dh: list[Tensor] = []
    dw = db = None
    for part, target in chunks:
        # Inputs that are not scored may be anything. Setting them to 0 costs less than setting the
        # much wider residual to 0, which then multiplies zeros.
        unscored = (target == IGNORED).unsqueeze(-1)
        part = part.masked_fill(unscored, 0)
        total, r, residual_sum = _residual(logit_head, any(wanted), part, w, b, target)
        totals.append(total)
        if r is None:
            continue
        if wanted[0]:
            dh.append((r @ w).masked_fill_(unscored, 0))
        if wanted[1]:
            share = r.mT @ part
            if len(chunks) == 1:
                dw = share
            else:
                # Sums over chunks are in the wide type; bfloat16 would lose what each chunk adds.
                dw = wide(share) if dw is None else dw.add_(share)
        if wanted[2] and residual_sum is not None:
            db = residual_sum if db is None else db + residual_sum
        # Free these before allocating those of the next chunk.
        del r
    grads = [
        torch.cat(dh) if len(dh) > 1 else dh[0] if dh else None,
        *(None if x is None else x.to(w.dtype) for x in (dw, db)),
    ]
    return _total(totals), grads


def _residual(
    logit_head: LogitHead, wanted: bool, h: Tensor, w: Tensor, b: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss of a chunk, the gradient by its logits, and that summed over scored rows.

    The gradient is in the type of the weight, and is not 0 in rows that are not scored. Each pass
    over the logits, the largest tensors of the step, is one that the result needs.
    """
    z = F.linear(h, w, b)
    kept = (y != IGNORED).unsqueeze(-1)
    index = torch.where(y != IGNORED, y, 0).unsqueeze(-1)
    if logit_head != LogitHead():
        z = logit_head(wide(z))
    # This is one pass that reads half precision and writes the wide type.
    p = z.softmax(-1, dtype=wide_type(z.dtype))
    # The largest probability is the inverse of the norm; a logsumexp would cost another pass.
    norm = wide(z.amax(-1, keepdim=True)) - p.amax(-1, keepdim=True).log()
    total = torch.where(kept, norm - wide(z.gather(-1, index)), 0).sum()
    if not wanted:
        return total, None, None
    slope = logit_head.slope(wide(z)) if logit_head != LogitHead() else None
    del z
    p.scatter_add_(-1, index, -torch.ones_like(norm))
    if slope is not None:
        p = p.mul_(slope)
    # The sum is taken before the residual is rounded.
    summed = None if b is None else (kept.to(p.dtype).mT @ p).squeeze(0)
    return total, p.to(w.dtype), summed


class _TokenLoss(torch.autograd.Function):
    """The loss, and as further outputs its gradients.

    As outputs they carry their own derivative: a backward pass with `create_graph` multiplies
    them with the cotangent of the loss, and so sends their cotangent here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logit_head: LogitHead,
        rows: int,
        wanted: list[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.logit_head, ctx.rows, ctx.wanted = logit_head, rows, wanted
        loss, grads = _sweep(logit_head, rows, wanted, hidden, weight, bias, targets)
        ctx.save_for_backward(hidden, weight, bias, targets, *grads)
        ctx.set_materialize_grads(False)
        return loss, *grads

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        hidden, weight, bias, targets, *grads = ctx.saved_tensors
        g, *into_grads = cotangents
        found = [None if d is None or g is None else g * d for d in grads]
        if any(c is not None for c in into_grads):
            inputs = (hidden, weight, bias)
            with no_autocast(hidden.device):
                more = _second(ctx.logit_head, ctx.rows, ctx.wanted, inputs, targets, into_grads)
            found = [b if a is None else a + b for a, b in zip(found, more, strict=True)]
        return None, None, None, *found, None


def _second(
    logit_head: LogitHead,
    rows: int,
    wanted: list[bool],
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    cotangents: list[Tensor | None],
) -> list[Tensor | None]:
    """Return the Hessian of the loss times the cotangents of its gradients."""
    h, w, b = inputs
    into_h, *rest = cotangents
    asked = [c is not None for c in cotangents]
    one = wide(h.new_ones(()))
    into_w: list[Tensor | None] = [None, None]
    into_rows: list[Tensor] = []
    moves = h.split(rows) if into_h is None else into_h.split(rows)
    for part, move, target in zip(h.split(rows), moves, targets.split(rows), strict=True):

        def grads(*xs: Tensor, target: Tensor = target) -> list[Tensor]:
            return chunk_grads(
                logit_head, asked, xs[0], xs[1], xs[2] if len(xs) > 2 else None, target, one
            )

        at = [part, w] if b is None else [part, w, b]
        toward = [c for c in (None if into_h is None else move, *rest) if c is not None]
        # Passed as cotangents, because is_grads_batched=True hides factors from the tape.
        first, *others = derivatives.pullback(grads, at, toward, wanted[: len(at)])
        if first is not None:
            into_rows.append(first)
        for i, value in enumerate(others):
            old = into_w[i]
            into_w[i] = value if old is None or value is None else old + value
    return [torch.cat(into_rows) if into_rows else None, *into_w]
