"""Attention tile by tile, with its gradient, second derivative and forward mode derived by hand.

With `u = scale q k'`, `z = cap tanh(u / cap)` (or `z = u`), `P = exp(z - lse)` on the keys of each
row, `dP = do v'` and `E = rowsum(P dP) - dl`, where `do` and `dl` are the cotangents of the output
and of `lse`:

    gradient             dU = z' P (dP - E);  dq = scale dU k, dk = scale dU' q, dv = P' do
    forward mode         Ut = scale (tq k' + q tk'), Zt = z' Ut, mu = rowsum(P Zt)
                         ot = P (Zt - mu) v + P tv;  the tangent of lse is mu
    second derivative    Phi = <(dq, dk, dv), (tq, tk, tv)> = <do, ot> + <dl, mu>, so its gradient
                         with respect to do is ot, and to dl it is mu;
                         R = P [Zt (dP - E) - mu dP + do tv' - eps], where eps makes rows sum to 0,
                         Ru = z' R + z'' Ut dZ;
                         to q it is scale (Ru k + dU tk), to k scale (Ru' q + dU' tq),
                         to v [P (Zt - mu)]' do

A tile holds whole rows, so a row's sums never cross tiles. Nothing but the rows of the inputs and
two numbers a row is kept between the passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.tiled_inputs import TiledInputs, add_keys, keys, put_rows, rows
from metafocus.attention.kernels.tiles import Tile
from metafocus.masks.spans import Spans
from metafocus.precision import half_in_tf32, wide


class Tiled:
    """Attention in pure torch with memory linear in the length of the sequence; a `TwiceKernel`.

    Half precision is widened to float32, and its products on CUDA are taken in TF32, as
    `half_in_tf32` says. Float32 products follow torch's own settings.
    """

    def forward(self, inputs: QKV, spans: Spans, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp of each row; see `Kernel`."""
        at = TiledInputs.of(inputs, spans, scaling)
        out, lse = at.empty(at.v.shape[-1]), at.empty(1)
        with half_in_tf32(inputs.q.dtype):
            for tile in at.tiles():
                z, _ = at.logits(tile)
                top = z.amax(-1, keepdim=True)
                top.masked_fill_(top == -torch.inf, 0.0)
                p = z.sub_(top).exp_()
                total = p.sum(-1, keepdim=True)
                none = total == 0
                total.masked_fill_(none, 1.0)
                put_rows(out, tile, (p @ keys(at.v, tile)) / total)
                put_rows(lse, tile, (top + total.log()).masked_fill_(none, 0.0))
        return Attended(out.flatten(1, 2).to(inputs.q.dtype), lse.flatten(1, 2).squeeze(-1))

    def backward(
        self,
        do: Tensor,
        inputs: QKV,
        found: Attended,
        spans: Spans,
        scaling: Scaling,
        dl: Tensor | None = None,
    ) -> QKV:
        """Return the gradients of `<do, output> + <dl, lse>`; see `TwiceKernel`."""
        at = TiledInputs.of(inputs, spans, scaling)
        e = at.grouped(_offset(do, found.o, dl))
        do, lse = at.grouped(do), at.grouped(found.lse.unsqueeze(-1))
        dq, dk, dv = at.empty(at.q.shape[-1]), torch.zeros_like(at.k), torch.zeros_like(at.v)
        with half_in_tf32(inputs.q.dtype):
            for tile in at.tiles():
                p, capped = at.probabilities(tile, lse)
                d = rows(do, tile)
                add_keys(dv, tile, p.transpose(-1, -2) @ d)
                du = (d @ keys(at.v, tile).transpose(-1, -2)).sub_(rows(e, tile)).mul_(p)
                if capped is not None:
                    du.mul_(_slope(capped))
                put_rows(dq, tile, du @ keys(at.k, tile))
                add_keys(dk, tile, du.transpose(-1, -2) @ rows(at.q, tile))
        dq = dq.flatten(1, 2).mul_(scaling.scale)
        return _in_types_of(inputs, dq, at.scaled(dk), dv)

    def forward_mode(
        self, inputs: QKV, lse: Tensor, tangents: QKV, spans: Spans, scaling: Scaling
    ) -> Attended:
        """Return the tangents of the output and of the logsumexp; see `TwiceKernel`."""
        at, along = (TiledInputs.of(x, spans, scaling) for x in (inputs, tangents))
        lse = at.grouped(lse.unsqueeze(-1))
        out, mu = at.empty(at.v.shape[-1]), at.empty(1)
        with half_in_tf32(inputs.q.dtype):
            for tile in at.tiles():
                p, capped = at.probabilities(tile, lse)
                moved = _moved(at, along, tile)
                if capped is not None:
                    moved.mul_(_slope(capped))
                moved.mul_(p)
                mean = moved.sum(-1, keepdim=True)
                put_rows(mu, tile, mean)
                moved.addcmul_(p, mean, value=-1)
                put_rows(out, tile, moved @ keys(at.v, tile) + p @ keys(along.v, tile))
        return Attended(out.flatten(1, 2).to(inputs.q.dtype), mu.flatten(1, 2).squeeze(-1))

    def double_backward(
        self,
        do: Tensor,
        dl: Tensor | None,
        inputs: QKV,
        found: Attended,
        tangents: QKV,
        spans: Spans,
        scaling: Scaling,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of `<(dq, dk, dv), tangents>`; see `TwiceKernel`."""
        at, along = (TiledInputs.of(x, spans, scaling) for x in (inputs, tangents))
        e = at.grouped(_offset(do, found.o, dl))
        wide_do, lse = at.grouped(do), at.grouped(found.lse.unsqueeze(-1))
        out, mu = at.empty(at.v.shape[-1]), at.empty(1)
        rq, rk, rv = (at.empty(at.k.shape[-1]), torch.zeros_like(at.k), torch.zeros_like(at.v))
        with half_in_tf32(inputs.q.dtype):
            for tile in at.tiles():
                p, capped = at.probabilities(tile, lse)
                d, values, along_v = rows(wide_do, tile), keys(at.v, tile), keys(along.v, tile)
                moved = _moved(at, along, tile)
                pt = moved * p if capped is None else moved * _slope(capped) * p
                mean = pt.sum(-1, keepdim=True)
                put_rows(mu, tile, mean)
                # The tangent of P, that is P (Zt - mu).
                pt.addcmul_(p, mean, value=-1)
                put_rows(out, tile, pt @ values + p @ along_v)
                add_keys(rv, tile, pt.transpose(-1, -2) @ d)
                spread = (d @ values.transpose(-1, -2)).sub_(rows(e, tile))
                # (Zt - mu)(dP - E) differs from Zt (dP - E) - mu dP by a constant of the row, which
                # goes with the row's sum.
                r = pt.mul_(spread).addcmul_(p, d @ along_v.transpose(-1, -2))
                r.addcmul_(p, r.sum(-1, keepdim=True), value=-1)
                du = spread.mul_(p)
                if capped is not None:
                    assert scaling.softcap is not None
                    slope = _slope(capped)
                    r.mul_(slope).addcmul_(
                        moved.mul_(capped).mul_(slope), du, value=-2 / scaling.softcap
                    )
                    du.mul_(slope)
                put_rows(rq, tile, r @ keys(at.k, tile) + du @ keys(along.k, tile))
                add_keys(rk, tile, r.transpose(-1, -2) @ rows(at.q, tile))
                add_keys(rk, tile, du.transpose(-1, -2) @ rows(along.q, tile))
        rdo, rdl = out.flatten(1, 2).to(do.dtype), mu.flatten(1, 2).squeeze(-1)
        rq = rq.flatten(1, 2).mul_(scaling.scale)
        return rdo, rdl, *_in_types_of(inputs, rq, at.scaled(rk), rv)


def _in_types_of(inputs: QKV, *tensors: Tensor) -> QKV:
    return QKV(*(x.to(like.dtype) for x, like in zip(tensors, inputs, strict=True)))


def _moved(at: TiledInputs, along: TiledInputs, tile: Tile) -> Tensor:
    """`Ut = scale (tq k' + q tk')`, in one product."""
    left = torch.cat((rows(along.q, tile), rows(at.q, tile)), dim=-1)
    right = torch.cat((keys(at.k, tile), keys(along.k, tile)), dim=-1)
    return at.scaled(left @ right.transpose(-1, -2))


def _slope(capped: Tensor) -> Tensor:
    return 1 - capped * capped


def _offset(do: Tensor, o: Tensor, dl: Tensor | None) -> Tensor:
    """`E = rowsum(P dP) - dl`; the row sum is that of `do o`."""
    e = (wide(do) * wide(o)).sum(-1, keepdim=True)
    return e if dl is None else e - dl.unsqueeze(-1)
