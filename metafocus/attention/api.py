"""`span_attention`: the one entry to every back end."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import Parameter

from metafocus.attention.custom_op import attention_operator
from metafocus.attention.function import Attention, Call
from metafocus.attention.kernels.auto import KERNELS, SMALL
from metafocus.attention.kernels.dense import dense
from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans
from metafocus.precision import as_autocast, no_autocast
from metafocus.torch_internals import without_function_modes

BACKENDS = ("dense", *KERNELS, "flex")


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    *,
    scale: float | None = None,
    backend: str = "auto",
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend each query to the one interval of keys that its span allows.

    `o_i = sum_j p_ij v_j` with `p_ij = exp(z_ij) / (exp(sink) + sum_j exp(z_ij))` over
    `start_i <= j < stop_i`, and `z_ij = scale q_i.k_j`, or `cap tanh(scale q_i.k_j / cap)`. A query
    without keys gets 0, and so does its gradient.

    Args:
        q: Queries `[B, H, S, D]`; float64, float32, bfloat16 or float16. Half precision is summed
            in float32.
        k: Keys `[B, Hkv, S, D]`, `H` a multiple of `Hkv` (grouped queries).
        v: Values `[B, Hkv, S, Dv]`.
        spans: The keys of each query, `[B, S]`, or `[1, S]` for all rows alike.
        scale: Factor of the products; default `1 / sqrt(D)`.
        backend: "auto": the fastest kernel that can serve the spans; its second derivatives and
            forward mode are those of "triton" on CUDA, if it passes its check there, else those of
            "tiled". "tiled": pure torch, memory linear in `S`, exact to the second order. "flash":
            fused kernels, on a GPU or a CPU, for spans made of turns; derivatives as with "auto".
            "triton": as "tiled", in Triton on CUDA, without the check. "dense": any order, memory
            quadratic in `S`. "flex": `flex_attention`, first order, on a GPU.
        softcap: Soft cap of the logits (Gemma 2), or None.
        sinks: `[H]`, a logit of each head that takes part in the sum without a value (gpt-oss).

    Returns:
        `[B, H, S, Dv]` in the type of `q`.

    Raises:
        ProblemError: If shapes, types or an argument do not fit, or the back end cannot serve them.
        TransformError: If a third derivative is asked of another back end than "dense", or
            forward mode inside forward mode.

    Example:
        >>> q = torch.randn(1, 4, 6, 8)
        >>> k = v = torch.randn(1, 2, 6, 8)
        >>> causal = Spans(torch.zeros(1, 6, dtype=torch.long), torch.arange(1, 7)[None])
        >>> span_attention(q, k, v, causal).shape
        torch.Size([1, 4, 6, 8])

    References:
        Dao et al., "FlashAttention", NeurIPS 2022, for the gradient from saved logsumexps.
    """
    # Function modes, such as the one that swaps operators, change nothing here and cost time at
    # every access to a tensor. A compiler needs its own modes, and a subclass its overrides.
    plain = all(type(x) in (Tensor, Parameter) for x in (q, k, v))
    seen = not plain or backend == "flex" or torch.compiler.is_compiling()
    with contextlib.nullcontext() if seen else without_function_modes():
        return _span_attention(q, k, v, spans, scale, backend, softcap, sinks)


def _span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float | None,
    backend: str,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    inputs = QKV(*as_autocast(q, k, v))
    q = inputs.q
    spans = _checked(inputs, spans, softcap, sinks, backend)
    scaling = Scaling(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap)
    if backend == "flex":
        # The import is here because it loads much of the compiler.
        from metafocus.attention.kernels.flex import flex

        return flex(inputs, spans, scaling)
    with no_autocast(q.device):
        out, lse = _attend(inputs, spans, scaling, backend)
    if sinks is None:
        return out
    # The share of the keys in a sum that the sink takes part in; its logit is not capped.
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out * share.unsqueeze(-1)).to(q.dtype)


def _attend(inputs: QKV, spans: Spans, scaling: Scaling, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "dense" or (backend == "auto" and inputs.q.shape[-2] <= SMALL):
        return dense(inputs, spans, scaling)
    if torch.compiler.is_compiling():
        return attention_operator(inputs, spans, scaling, backend)
    return Attention.apply(Call(KERNELS[backend](), scaling), *inputs, *spans)


def _checked(
    inputs: QKV, spans: Spans, softcap: float | None, sinks: Tensor | None, backend: str
) -> Spans:
    q, k, v = inputs
    if backend not in BACKENDS:
        raise ProblemError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}.")
    if not isinstance(spans, Spans):
        raise ProblemError(
            f"spans must be mf.Spans, the keys [start, stop) of each query, got "
            f"{type(spans).__name__}; a mask policy makes them: mf.masks.causal(batch)."
        )
    for name, x in zip(QKV._fields, inputs, strict=True):
        if x.ndim != 4 or not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise ProblemError(
                f"{name} must be a floating-point tensor [B, heads, S, D] of the type and device "
                f"of q ({q.dtype}, {q.device}), got {x.dtype} {list(x.shape)} on {x.device}."
            )
    batch, heads, length, width = q.shape
    fits = k.shape[0] == batch and k.shape[2:] == (length, width) and v.shape[:3] == k.shape[:3]
    if not fits or heads % max(k.shape[1], 1) or width == 0:
        raise ProblemError(
            "q [B, H, S, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] must agree, H a multiple of "
            f"Hkv; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}. There are as many keys "
            "as queries: attention from a cache is not served."
        )
    for name, x in zip(Spans._fields, spans, strict=True):
        integer = not (x.is_floating_point() or x.dtype == torch.bool or x.is_complex())
        if not integer or x.shape not in ((batch, length), (1, length)) or x.device != q.device:
            raise ProblemError(
                f"spans.{name} must be an integer tensor [{batch}, {length}] on {q.device}, got "
                f"{x.dtype} {list(x.shape)} on {x.device}."
            )
    if softcap is not None and not softcap > 0:
        raise ProblemError(f"softcap={softcap} must be positive, or None for no cap.")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ProblemError(
            f"sinks must be one floating-point logit for each of the {heads} heads, got "
            f"{sinks.dtype} {list(sinks.shape)}."
        )
    if sinks is not None and backend == "flex":
        raise ProblemError('backend="flex" has no sinks; use "auto", "tiled" or "dense".')
    return Spans(*(x.expand(batch, length) for x in spans))
