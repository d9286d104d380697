from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from test_attention_query_runs import (
    LENGTH,
    PADDINGS,
    POLICIES,
    Reference,
    attention,
    chat,
    gradients,
    tensors,
)
from torch import Tensor

from metafocus import masks
from metafocus.attention.kernels import flash, flash_cpu, served
from metafocus.attention.kernels import varlen as flash_varlen
from metafocus.attention.kernels.flash import Flash, prepare
from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.query_runs import find_query_runs
from metafocus.attention.kernels.served import run_limit
from metafocus.attention.kernels.varlen import FlashAttn, Lengths, TorchVarlen
from metafocus.comparison.memory import peak_bytes
from metafocus.errors import ProblemError
from metafocus.masks import Spans

SHAPE = Scaling(0.4)


def close(got: Tensor, want: Tensor, bound: float) -> None:
    """Compare entries with the largest one."""
    assert (got.double() - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_dense_attention(policy, padding, packed):
    spans = POLICIES[policy](chat(padding, packed))
    do, q, k, v = tensors(2, LENGTH)
    kernel = Flash()
    o, lse = kernel.forward(QKV(q, k, v), spans, SHAPE)
    exact, exact_lse = attention(q, k, v, spans, SHAPE)
    # Sums of at most 24 terms of order one, in float64.
    torch.testing.assert_close(o, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-12)
    grads = kernel.backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    for got, want in zip(grads, gradients(do, q, k, v, spans, SHAPE), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2), (5, 1)])
def test_grouped_heads(heads, kv):
    spans = masks.context_bidirectional(chat("left"))
    do, q, k, v = tensors(2, LENGTH, heads, kv, size=5)
    o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
    torch.testing.assert_close(o, attention(q, k, v, spans, SHAPE)[0], rtol=0, atol=1e-12)
    grads = Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    for got, want in zip(grads, gradients(do, q, k, v, spans, SHAPE), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def strided(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers in another order in memory."""
    inverse = sorted(range(4), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("policy", ["context_bidirectional", "windowed"])
def test_any_strides(policy, order):
    # torch's kernel reads rows as if they were dense, and is silently wrong where they are not.
    spans = POLICIES[policy](chat())
    do, q, k, v = tensors(2, LENGTH)
    o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
    grads = Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    other = [strided(x, order) for x in (do, q, k, v)]
    assert not all(x.is_contiguous() for x in other)
    o2, lse2 = Flash().forward(QKV(*other[1:]), spans, SHAPE)
    torch.testing.assert_close(o2, o, rtol=0, atol=1e-14)
    grads2 = Flash().backward(
        other[0],
        QKV(*other[1:]),
        Attended(strided(o, order), lse2.mT.contiguous().mT),
        spans,
        SHAPE,
    )
    for got, want in zip(grads2, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


# Rounding of inputs aside, outputs are rounded once per piece: 2^-8 and 2^-11 of the largest entry
# of a piece, and gradients sum such shares. Measured over 20 seeds: at most 0.63 of these bounds.
BOUNDS = {torch.float32: (1e-6, 3e-6), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-3, 3e-3)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("policy", ["context_bidirectional", "causal", "windowed"])
def test_types(policy, dtype):
    spans = POLICIES[policy](chat("right"))
    inputs = [x.to(dtype) for x in tensors(2, LENGTH, size=32)]
    do, q, k, v = inputs
    o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
    assert o.dtype == dtype and lse.dtype == torch.float32
    wide = [x.double() for x in inputs]
    exact, exact_lse = attention(*wide[1:], spans, SHAPE)
    forward, backward = BOUNDS[dtype]
    close(o, exact, forward)
    # From exact products of the rounded inputs, in float32.
    close(lse, exact_lse, 1e-5)
    grads = Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    for got, want in zip(grads, gradients(*wide, spans, SHAPE), strict=True):
        assert got.dtype == dtype
        close(got, want, backward)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_large_logits_stay_finite(size):
    spans = masks.context_bidirectional(chat("left"))
    do, q, k, v = tensors(2, LENGTH)
    q = q * size
    o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
    exact, exact_lse = attention(q, k, v, spans, SHAPE)
    # A logit of size z is known to 1e-16 z, and so is the exponent of its probability.
    torch.testing.assert_close(o, exact, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-13, atol=1e-12)
    for x in Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE):
        assert x.isfinite().all()


def test_equal_turns_of_neighbouring_rows_go_together():
    one = masks.context_bidirectional({k: v[:1] for k, v in chat().items()})
    other = masks.causal({k: v[:1] for k, v in chat().items()})
    spans = Spans(*(torch.cat([a, a, b, a]) for a, b in zip(one, other, strict=True)))
    groups = flash_cpu.groups(find_query_runs(spans))
    assert {(g.row, g.row_end) for g in groups} == {(0, 2), (2, 3), (3, 4)}
    do, q, k, v = tensors(4, LENGTH)
    o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
    torch.testing.assert_close(o, attention(q, k, v, spans, SHAPE)[0], rtol=0, atol=1e-12)
    grads = Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    for got, want in zip(grads, gradients(do, q, k, v, spans, SHAPE), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def focus(length: int, runs: int) -> Spans:
    turn_ids = (torch.arange(length) * runs).div(length, rounding_mode="floor").unsqueeze(0)
    batch = {"input_ids": turn_ids, "turn_ids": turn_ids, "answer_mask": turn_ids % 2 == 1}
    return masks.context_bidirectional(batch)


def test_memory_is_linear():
    def peak(length: int) -> int:
        spans = focus(length, 16)
        do, q, k, v = (x.float() for x in tensors(1, length, heads=2, kv=2, size=16))

        def run():
            o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
            return Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)

        return peak_bytes(run)[1]

    small, large = peak(1024), peak(4096)
    assert large <= 4.2 * small
    assert large < 4096 * 4096


def test_the_output_is_laid_out_for_merging_heads():
    spans = masks.causal(chat())
    _, q, k, v = tensors(2, LENGTH)
    o, _ = Flash().forward(QKV(q, k, v), spans, SHAPE)
    assert o.transpose(1, 2).is_contiguous()


def halves(dtype: torch.dtype = torch.float32, size: int = 8, values: int | None = None) -> Any:
    q, k = torch.zeros(2, 1, 2, LENGTH, size, dtype=dtype).unbind()
    return q, k, torch.zeros(1, 2, LENGTH, values or size, dtype=dtype)


CAUSAL = Spans(torch.zeros(1, LENGTH).long(), torch.arange(1, LENGTH + 1)[None])


@pytest.mark.parametrize(
    "arguments, scaling, words",
    [
        (halves(values=4), SHAPE, "values have head size 4 and keys 8"),
        (halves(), Scaling(1.0, 30.0), r"softcap=30.0, and only flash-attn"),
        (halves(torch.float8_e5m2), SHAPE, "no torch.float8_e5m2"),
        ((*halves()[:2], halves(torch.float64)[2]), SHAPE, "torch.float32, torch.float64"),
        (tuple(x.to("meta") for x in halves()), SHAPE, "on meta"),
    ],
    ids=["values", "softcap", "type", "types", "device"],
)
def test_says_what_it_cannot_serve(arguments, scaling, words):
    assert isinstance(prepare(QKV(*arguments), CAUSAL, scaling), str)
    with pytest.raises(ProblemError, match=words):
        Flash().forward(QKV(*arguments), CAUSAL, scaling)
    with pytest.raises(ProblemError, match=r'backend="flash" .* Use backend="auto" or'):
        Flash().forward(QKV(*arguments), CAUSAL, scaling)


@pytest.mark.parametrize(
    "dtype, size, capability, words",
    [
        (torch.float32, 64, (9, 0), "torch.float32, and CUDA kernels take bfloat16"),
        (torch.bfloat16, 60, (9, 0), "head size is 60"),
        (torch.bfloat16, 264, (9, 0), "head size is 264"),
        (torch.float16, 64, (7, 5), r"\(7, 5\), and the kernels need \(8, 0\)"),
        (torch.float16, 256, (8, 9), "at most 192"),
    ],
    ids=["type", "size", "large", "old", "small"],
)
def test_says_what_cuda_cannot_serve(dtype, size, capability, words):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(served._unserved_on_cuda(dtype, size, capability, FlashAttn()))


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 128), (torch.float16, 256)])
def test_what_cuda_can_serve(dtype, size):
    assert served._unserved_on_cuda(dtype, size, (8, 0), FlashAttn()) is None


@pytest.mark.parametrize("what", ["random", "narrow"])
def test_spans_of_many_turns_are_better_served_by_tiles(what):
    length = 256
    place = torch.arange(length)[None]
    spans = Spans((place - 1).clamp(min=0), place + 1)
    words = "the spans need 509 calls of the kernel, more than 25"
    if what == "random":
        spans = Spans(torch.zeros_like(place), torch.randint(1, length, (1, length)))
        words = "more than 25 runs (1 rows of 256 tokens)"
    do, q, k, v = tensors(1, length)
    text = prepare(QKV(q, k, v), spans, SHAPE)
    assert isinstance(text, str) and words in text
    # And yet they are served, where that is asked for.
    o, lse = Flash().forward(QKV(q, k, v), spans, SHAPE)
    torch.testing.assert_close(o, attention(q, k, v, spans, SHAPE)[0], rtol=0, atol=1e-12)
    grads = Flash().backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    for got, want in zip(grads, gradients(do, q, k, v, spans, SHAPE), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_limit_grows_with_the_rows():
    for device in ("cpu", "cuda"):
        for length in (1, 100, 10_000):
            assert run_limit(6, length, device) == 6 * run_limit(1, length, device)


def test_turns_are_found_once(monkeypatch):
    calls = []
    real = flash.find_query_runs
    monkeypatch.setattr(flash, "find_query_runs", lambda *args: calls.append(1) or real(*args))
    spans = masks.context_bidirectional(chat())
    do, q, k, v = tensors(2, LENGTH)
    kernel = prepare(QKV(q, k, v), spans, SHAPE)
    assert isinstance(kernel, Flash) and len(kernel.runs) == len(real(spans))
    # As an autograd Function hands them over: other objects on the same memory.
    same = Spans(*(x.view_as(x) for x in spans))
    o, lse = kernel.forward(QKV(q, k, v), same, SHAPE)
    kernel.backward(do, QKV(q, k, v), Attended(o, lse), same, SHAPE)
    assert len(calls) == 1


def test_known_turns_are_not_used_for_other_spans():
    spans = masks.context_bidirectional(chat())
    _, q, k, v = tensors(2, LENGTH)
    kernel = prepare(QKV(q, k, v), spans, SHAPE)
    assert isinstance(kernel, Flash)
    other = masks.causal(chat())
    torch.testing.assert_close(
        kernel.forward(QKV(q, k, v), other, SHAPE)[0], attention(q, k, v, other, SHAPE)[0]
    )
    spans.stop.copy_(other.stop)
    torch.testing.assert_close(
        kernel.forward(QKV(q, k, v), spans, SHAPE)[0], attention(q, k, v, other, SHAPE)[0]
    )
    # What the kernel cannot do at all, it refuses with known runs as well.
    with pytest.raises(ProblemError, match="soft caps"):
        kernel.forward(QKV(q, k, v), spans, Scaling(0.4, softcap=3.0))


def test_inference_tensors():
    with torch.inference_mode():
        spans = masks.causal(chat())
        _, q, k, v = tensors(2, LENGTH)
        kernel = prepare(QKV(q, k, v), spans, SHAPE)
        assert isinstance(kernel, Flash)
        torch.testing.assert_close(
            kernel.forward(QKV(q, k, v), spans, SHAPE)[0], attention(q, k, v, spans, SHAPE)[0]
        )


# The libraries behind the CUDA path, as far as they can be seen without a device.


def lengths(left: int, right: int, device: str = "cpu") -> Lengths:
    queries, keys = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 4, 9]))
    return Lengths(queries.to(device), keys.to(device), 3, 5, left, right)


WINDOWS = [(-1, -1), (-1, 0), (2, 0), (2, -1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_torch_kernels_take_the_arguments(window):
    q = torch.empty(5, 4, 16, dtype=torch.bfloat16, device="meta")
    k = torch.empty(9, 2, 16, dtype=torch.bfloat16, device="meta")
    call = lengths(*window, device="meta")
    o, lse = TorchVarlen().forward(QKV(q, k, k), call, SHAPE)
    assert o.shape == q.shape and lse.shape == (4, 5) and lse.dtype == torch.float32
    grads = TorchVarlen().backward(o, QKV(q, k, k), Attended(o, lse), call, SHAPE)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


def fake_flash_attn() -> types.ModuleType:
    """The two functions of flash-attn 2.7 and 2.8 with their signatures, on the reference."""

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    ):
        assert dropout_p == 0.0 and causal == (window_size_left < 0 and window_size_right == 0)
        call = Lengths(
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            window_size_left,
            window_size_right,
        )
        return (
            *Reference().forward(QKV(q, k, v), call, Scaling(softmax_scale, softcap or None)),
            None,
            0,
        )

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert dropout_p == 0.0 and causal == (window_size_left < 0 and window_size_right == 0)
        assert alibi_slopes is None and deterministic is False
        call = Lengths(
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            window_size_left,
            window_size_right,
        )
        scaling = Scaling(softmax_scale, softcap or None)
        grads = Reference().backward(dout, QKV(q, k, v), Attended(out, softmax_lse), call, scaling)
        for x, y in zip((dq, dk, dv), grads, strict=True):
            x.copy_(y)

    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    interface: Any = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    package.flash_attn_interface = interface  # pyright: ignore[reportAttributeAccessIssue]
    return package


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_flash_attn_takes_the_arguments(monkeypatch, window, softcap):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    q, do = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 9, 2, 8, dtype=torch.float64)
    call, scaling = lengths(*window), Scaling(0.3, softcap)
    o, lse = FlashAttn().forward(QKV(q, k, v), call, scaling)
    want = Reference().forward(QKV(q, k, v), call, scaling)
    assert torch.equal(o, want[0]) and torch.equal(lse, want[1])
    grads = FlashAttn().backward(do, QKV(q, k, v), Attended(o, lse), call, scaling)
    exact = Reference().backward(do, QKV(q, k, v), Attended(o, lse), call, scaling)
    assert all(map(torch.equal, grads, exact))


@pytest.mark.parametrize(
    "version, chosen",
    [
        ("2.8.3", FlashAttn),
        ("2.7.0.post2", FlashAttn),
        ("2.6.3", TorchVarlen),
        ("4.0.0b1", TorchVarlen),
    ],
)
def test_which_library(monkeypatch, version, chosen):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    monkeypatch.setattr(flash_varlen.importlib.metadata, "version", lambda name: version)
    flash_varlen._has_flash_attn.cache_clear()
    try:
        assert isinstance(flash_varlen.installed(), chosen)
    finally:
        flash_varlen._has_flash_attn.cache_clear()


def test_torch_where_flash_attn_is_not_installed(monkeypatch):
    monkeypatch.setattr(flash_varlen.importlib.util, "find_spec", lambda name: None)
    flash_varlen._has_flash_attn.cache_clear()
    try:
        assert isinstance(flash_varlen.installed(), TorchVarlen)
    finally:
        flash_varlen._has_flash_attn.cache_clear()


def test_kernels_that_are_activated_in_torch_are_used_and_looked_at(monkeypatch):
    """Torch's registry replaces the operators that `TorchVarlen` calls, as for FA3 on CUDA."""
    from torch.nn import attention

    assert {"FA3", "FA4"} <= set(attention.list_flash_attention_impls())
    q, k, do = tensors(1, 9)[:3]
    q, k, do = (x[0, :2].mT.transpose(1, 2).transpose(0, 1) for x in (q, k, do))
    called, seen = [], []

    class Handle:
        def __init__(self):
            self.library = torch.library.Library("aten", "IMPL", "CPU")
            self.library.impl("_flash_attention_forward", self.forward)
            self.library.impl("_flash_attention_backward", self.backward)

        def forward(self, q, k, v, *rest, **options):
            called.append("forward")
            none = torch.empty(0)
            return q + 1, q.new_zeros(q.shape[1], len(q)), none, none, none

        def backward(self, do, q, k, v, *rest, **options):
            called.append("backward")
            return do, k, v

        def remove(self):
            self.library._destroy()

    monkeypatch.setattr(flash_varlen, "_has_flash_attn", lambda: True)
    assert isinstance(flash_varlen.installed(), FlashAttn)
    monkeypatch.setattr(flash, "_fault", lambda *args: seen.append(args[-1]))
    attention.register_flash_attention_impl("ours", register_fn=Handle)
    attention.activate_flash_attention_impl("ours")
    try:
        varlen = flash_varlen.installed()
        assert isinstance(varlen, TorchVarlen)
        bounds = torch.tensor([0, len(q)], dtype=torch.int32)
        call = Lengths(bounds, bounds, len(q), len(q), -1, 0)
        found = varlen.forward(QKV(q, k, k), call, SHAPE)
        assert torch.equal(found.o, q + 1)
        assert torch.equal(varlen.backward(do, QKV(q, k, k), found, call, SHAPE).q, do)
        flash.fault(torch.device("cuda"), torch.bfloat16, 64)
    finally:
        attention.restore_flash_attention_impl()
        attention._registry._FLASH_ATTENTION_IMPLS.pop("ours")
    assert called == ["forward", "backward"]
    flash.fault(torch.device("cuda"), torch.bfloat16, 64)
    # Another library is another kernel, which is compared with tiles by itself.
    assert seen == ["ours", None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "sliding_window_1"])
@pytest.mark.parametrize("varlen", [TorchVarlen, FlashAttn])
def test_cuda(monkeypatch, varlen, policy, padding, dtype):
    if varlen is FlashAttn and not flash_varlen._has_flash_attn():
        pytest.skip("flash-attn is not installed")
    monkeypatch.setattr(flash, "installed", varlen)
    spans = POLICIES[policy](chat(padding))
    inputs = [x.to("cuda", dtype) for x in tensors(2, LENGTH, size=64)]
    do, q, k, v = inputs
    there = Spans(*(x.cuda() for x in spans))
    o, lse = Flash().forward(QKV(q, k, v), there, SHAPE)
    assert o.dtype == dtype and lse.dtype == torch.float32
    wide = [x.double().cpu() for x in inputs]
    exact, exact_lse = attention(*wide[1:], spans, SHAPE)
    forward, backward = BOUNDS[dtype]
    close(o.cpu(), exact, forward)
    close(lse.cpu(), exact_lse, 1e-4)
    grads = Flash().backward(do, QKV(q, k, v), Attended(o, lse), there, SHAPE)
    for got, want in zip(grads, gradients(*wide, spans, SHAPE), strict=True):
        close(got.cpu(), want, backward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_cuda_does_not_wait_when_turns_are_known():
    spans = Spans(*(x.cuda() for x in focus(4096, 16)))
    do, q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 4096, size=64))
    kernel = prepare(QKV(q, k, v), spans, SHAPE)
    assert isinstance(kernel, Flash)
    kernel.backward(do, QKV(q, k, v), kernel.forward(QKV(q, k, v), spans, SHAPE), spans, SHAPE)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        o, lse = kernel.forward(QKV(q, k, v), spans, SHAPE)
        kernel.backward(do, QKV(q, k, v), Attended(o, lse), spans, SHAPE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_is_looked_at_before_it_is_used(dtype, monkeypatch):
    """Right kernels pass the check of a device; of others it says what is wrong."""
    cpu = torch.device("cpu")

    def look(*args):
        flash._fault.cache_clear()
        return flash.fault(*args)

    assert look(cpu, dtype, 16) is None
    right = flash.flash_cpu.backward
    monkeypatch.setattr(flash.flash_cpu, "backward", lambda *a: tuple(2 * x for x in right(*a)))
    assert "are wrong on a small example" in look(cpu, dtype, 16)

    def broken(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(flash.flash_cpu, "forward", broken)
    assert "failed on a small example: no kernel image" in look(cpu, dtype, 16)
