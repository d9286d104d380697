"""Cross entropy of a linear head, a chunk of positions at a time: no logits of all positions.

Three forms of one value, chosen by what is looking: on the tape the first derivative is made in
the forward pass, while the logits of a chunk are there; under function transforms each chunk is
recomputed for a derivative; a compiler sees plain operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from metafocus.autodiff.recompute import recompute
from metafocus.errors import ProblemError
from metafocus.lm.hf.chunk import Tail, chunk_grads, chunk_loss, no_autocast
from metafocus.lm.hf.taped import sweep, taped
from metafocus.torch_internals import is_tracked, transforming


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    tail: Tail = Tail(),  # noqa: B008 - frozen, so it can be shared
    chunk: int | None = None,
) -> Tensor:
    """Return the sum of the cross entropies of a linear head, in memory `O(chunk * V)`.

    `loss = sum_i [y_i != -100] (logsumexp_v z_iv - z_iy_i)` with `z = tail(h W' + b)`. Softmax
    and sum are in float32, or in float64 for float64. Exact in every order and mode of
    differentiation; the logits of all positions never exist at once up to the second derivative
    (under `torch.func.grad` and with `create_graph`: up to the first).

    Args:
        hidden: `h`, `[N, D]`.
        weight: `W`, `[V, D]`.
        targets: `y`, int64 `[N]`; -100 where a position is not scored.
        bias: `b`, `[V]`.
        tail: what follows the linear map.
        chunk: rows at a time; default about 4 million logits (64 million on a GPU), and at
            least 128 rows.

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
    rows = chunk or _rows(len(weight), hidden.is_cuda)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        # As F.linear would do; what follows runs in the types it is given, in every pass.
        low = torch.get_autocast_dtype(kind)
        hidden, weight = (_cast(x, low) for x in (hidden, weight))
        bias = None if bias is None else _cast(bias, low)
    with no_autocast(kind):
        if transforming():
            return _recomputed(tail, rows, hidden, weight, bias, targets)
        inputs = (hidden, weight, bias)
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
        if any(wanted):
            return taped(tail, rows, wanted, inputs, targets)
        return sweep(tail, rows, wanted, *inputs, targets)[0]


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


def _rows(vocabulary: int, gpu: bool) -> int:
    return max((1 << (26 if gpu else 22)) // vocabulary, 128)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _recomputed(tail: Tail, rows: int, h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    chunks = zip(h.split(rows), y.split(rows), strict=True)
    if torch.compiler.is_compiling():
        return _total([chunk_loss(tail, part, w, b, target) for part, target in chunks])
    wanted = [x is not None and is_tracked(x) for x in (h, w, b)]

    def pullback(args: tuple[Any, ...], cotangent: Tensor) -> tuple[Any, ...]:
        found = iter(recompute(partial(chunk_grads, tail, wanted), *args, cotangent))
        return *(next(found) if wants else None for wants in wanted), None

    loss = partial(chunk_loss, tail)
    return _total(
        [recompute(loss, part, w, b, target, pullback=pullback) for part, target in chunks]
    )


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
