from __future__ import annotations

import warnings

import pytest
import torch
from test_attention_query_runs import (
    LENGTH,
    PADDINGS,
    POLICIES,
    attention,
    chat,
    gradients,
    tensors,
)

from metafocus import masks
from metafocus.attention.kernels.flex import flex
from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.errors import ProblemError
from metafocus.masks import Spans


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_dense_attention(policy, padding):
    spans = POLICIES[policy](chat(padding))
    _, q, k, v = tensors(2, LENGTH)
    # Sums of at most 24 terms of order one, in float64.
    want = attention(q, k, v, spans, Scaling(0.4))[0]
    torch.testing.assert_close(flex(QKV(q, k, v), spans, Scaling(0.4)), want, rtol=0, atol=1e-12)


def test_soft_cap_value_size_and_equal_heads():
    spans = masks.context_bidirectional(chat("left"))
    _, q, k, v = tensors(2, LENGTH, heads=2, kv=2)
    v = v[..., :5]
    want = attention(q, k, v, spans, Scaling(0.4, softcap=1.5))[0]
    got = flex(QKV(q, k, v), spans, Scaling(0.4, 1.5))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_types(dtype, bound):
    # Longer than a block of the mask, and not a multiple of it.
    length = 200
    stop = torch.arange(1, length + 1).expand(1, -1).clone()
    stop[:, 40:150] = 150
    stop[:, -3:] = 0
    spans = Spans(torch.zeros_like(stop), stop)
    _, q, k, v = (x.to(dtype) for x in tensors(1, length))
    got = flex(QKV(q, k, v), spans, Scaling(0.4))
    want = attention(q.double(), k.double(), v.double(), spans, Scaling(0.4))[0]
    assert got.dtype == dtype and not got[:, :, -3:].any()
    assert (got.double() - want).abs().max() <= bound * want.abs().max()


def test_refuses_a_gradient_on_a_cpu():
    spans = masks.causal(chat())
    _, q, k, v = tensors(2, LENGTH)
    words = 'backend="flex" has no gradient on a CPU. Use backend="flash"'
    with pytest.raises(ProblemError, match=words):
        flex(QKV(q, k.requires_grad_(), v), spans, Scaling(0.4))
    with pytest.raises(ProblemError, match=words):
        torch.func.grad(lambda v: flex(QKV(q, k.detach(), v), spans, Scaling(0.4)).sum())(v)
    with pytest.raises(ProblemError, match=words):
        torch.func.jvp(lambda v: flex(QKV(q, k.detach(), v), spans, Scaling(0.4)), (v,), (v,))
    with torch.no_grad():
        flex(QKV(q, k, v), spans, Scaling(0.4))


def test_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex(QKV(*tensors(2, LENGTH)[1:]), masks.causal(chat()), Scaling(0.4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda(policy, softcap):
    spans, scaling = POLICIES[policy](chat("left")), Scaling(0.4, softcap)
    do, q, k, v = (x.bfloat16() for x in tensors(2, LENGTH, size=64))
    there = [x.cuda().requires_grad_() for x in (q, k, v)]
    got = flex(QKV(*there), Spans(*(x.cuda() for x in spans)), scaling)
    wide = [x.double() for x in (q, k, v)]
    want = [attention(*wide, spans, scaling)[0], *gradients(do.double(), *wide, spans, scaling)]
    results = [got, *torch.autograd.grad(got, there, do.cuda())]
    for x, y in zip(results, want, strict=True):
        assert (x.double().cpu() - y).abs().max() <= 2e-2 * y.abs().max()
