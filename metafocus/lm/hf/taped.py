"""The chunked cross entropy on the tape: its first derivative is made in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metafocus.autodiff import grad as derivatives
from metafocus.lm.hf.chunk import IGNORED, Tail, chunk_grads, no_autocast, wide


def taped(
    tail: Tail,
    rows: int,
    wanted: list[bool],
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
) -> Tensor:
    """Return the loss of `hidden, weight, bias`, with the derivatives that are wanted."""
    return _Taped.apply(tail, rows, wanted, *inputs, targets)[0]  # pyright: ignore


def sweep(
    tail: Tail,
    rows: int,
    wanted: list[bool],
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and its gradients by `h`, `w`, `b`, None where not wanted; no graph."""
    total = wide(h.new_zeros(()))
    dh = torch.empty_like(h) if wanted[0] else None
    # Sums over chunks in the wide type: bfloat16 would lose what each chunk adds.
    dw = wide(torch.zeros_like(w)) if wanted[1] else None
    db = wide(w.new_zeros(len(w))) if wanted[2] else None
    start = 0
    for part, target in zip(h.split(rows), y.split(rows), strict=True):
        z = wide(F.linear(part, w, b))
        if tail.scale != 1:
            z = z.mul_(tail.scale)
        if tail.softcap is not None:
            z = z.div_(tail.softcap).tanh_().mul_(tail.softcap)
        kept = target != IGNORED
        index = torch.where(kept, target, 0).unsqueeze(-1)
        # The largest probability is the inverse of the norm: cheaper than a logsumexp beside it.
        p = z.softmax(-1)
        norm = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        total += torch.where(kept.unsqueeze(-1), norm - z.gather(-1, index), 0).sum()
        if not any(wanted):
            continue
        slope = tail.slope(z)
        p.scatter_add_(-1, index, -torch.ones_like(norm))
        p = p.mul_(slope).masked_fill_(~kept.unsqueeze(-1), 0)
        r = p.to(w.dtype)
        stop = start + len(part)
        if dh is not None:
            torch.mm(r, w, out=dh[start:stop])
        if dw is not None:
            dw.addmm_(r.mT, part) if dw.dtype == w.dtype else dw.add_(r.mT @ part)
        if db is not None:
            db += p.sum(0)
        start = stop
        # Before the next chunk's.
        del z, p, r
    return total, [dh, *(None if x is None else x.to(w.dtype) for x in (dw, db))]


class _Taped(torch.autograd.Function):
    """The loss, and as further outputs its gradients.

    As outputs they carry their own derivative: a backward pass with `create_graph` multiplies
    them with the cotangent of the loss, and so sends their cotangent here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tail: Tail,
        rows: int,
        wanted: list[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.tail, ctx.rows, ctx.wanted = tail, rows, wanted
        loss, grads = sweep(tail, rows, wanted, hidden, weight, bias, targets)
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
            with no_autocast(hidden.device.type):
                more = _second(ctx.tail, ctx.rows, ctx.wanted, inputs, targets, into_grads)
            found = [b if a is None else a + b for a, b in zip(found, more, strict=True)]
        return None, None, None, *found, None


def _second(
    tail: Tail,
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
                tail, asked, xs[0], xs[1], xs[2] if len(xs) > 2 else None, target, one
            )

        at = [part, w] if b is None else [part, w, b]
        toward = [c for c in (None if into_h is None else move, *rest) if c is not None]
        # As cotangents, not as factors: is_grads_batched=True hides factors from the tape.
        first, *others = derivatives.pullback(grads, at, toward, wanted[: len(at)])
        if first is not None:
            into_rows.append(first)
        for i, value in enumerate(others):
            old = into_w[i]
            into_w[i] = value if old is None or value is None else old + value
    return [torch.cat(into_rows) if into_rows else None, *into_w]
