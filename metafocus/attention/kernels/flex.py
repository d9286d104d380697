"""`flex_attention` of torch over spans: one kernel for any spans on a GPU, first order only."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans
from metafocus.torch_internals import is_tracked


def flex(inputs: QKV, spans: Spans, scaling: Scaling) -> Tensor:
    """Attention over spans by `torch.nn.attention.flex_attention`, with its own first derivative.

    On a GPU the kernel is compiled for these shapes at the first call and skips blocks of 128 x 128
    that no span touches. On a CPU torch computes all `S x S` logits and has no gradient: a check,
    not a back end to work with. A row without keys gives zeros.

    Returns:
        The output `[B, H, S, Dv]`.

    Raises:
        ProblemError: If a gradient is asked for on a CPU.

    Example:
        >>> x = torch.ones(1, 1, 2, 4)
        >>> spans = Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 0]]))
        >>> flex(QKV(x, x, x), spans, Scaling(0.5))[0, 0].tolist()
        [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    q, k, v = inputs
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(map(is_tracked, inputs)):
            raise ProblemError(
                'backend="flex" has no gradient on a CPU. Use backend="flash" (first order) or '
                '"tiled" (first and second), or call it under torch.no_grad()'
            )
        # torch refuses by the flag of the tensors, also where no gradient is recorded.
        q, k, v = (x.detach() for x in (q, k, v))
    score_mod = None if scaling.softcap is None else _cap(scaling.softcap)
    with warnings.catch_warnings():
        # torch advises to compile, but on a CPU this runs uncompiled on purpose.
        warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
        return _kernel(q)(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=spans.block_mask(),
            scale=scaling.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _kernel(q: Tensor) -> Callable[..., Any]:
    # Code that is being compiled already compiles the kernel along.
    if q.device.type == "cpu" or torch.compiler.is_compiling():
        return flex_attention
    return _compiled_flex_attention()


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _cap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod
