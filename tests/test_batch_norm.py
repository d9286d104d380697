"""Batch norm on the tape: torch's kernels and memory, derivatives of every order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import metafocus as mf
from metafocus.autodiff.safe_operators import batch_norm, group_norm, instance_norm, norms
from metafocus.comparison.memory import peak_bytes

X = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W, B = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.2, 0.5]).double()


def leaves(*xs):
    return [x.clone().requires_grad_() for x in xs]


def norm(x, w=None, b=None):
    return batch_norm(x, None, None, w, b, training=True)


@pytest.mark.parametrize("affine", [True, False])
def test_derivatives(affine):
    given = leaves(X, W, B) if affine else leaves(X)
    assert torch.equal(norm(*given), F.batch_norm(given[0], None, None, *given[1:], training=True))
    assert torch.autograd.gradcheck(norm, given)
    assert torch.autograd.gradgradcheck(norm, given)


def test_third_derivatives_are_those_of_the_formula():
    def third(f):
        x, w, b = leaves(X, W, B)
        (g,) = torch.autograd.grad((f(x, w, b).sin()).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sin().sum(), w, create_graph=True)
        return torch.autograd.grad(h.sin().sum(), [x, w, b])

    def pieces(x, w, b):
        return norms.batch_norm(x, None, None, w, b, training=True)

    for ours, theirs in zip(third(norm), third(pieces), strict=True):
        # The same formula, summed in another order, three times over.
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_running_statistics_are_never_written():
    mean, var = torch.zeros(2).double(), torch.ones(2).double()
    (x,) = leaves(X)
    batch_norm(x, mean, var, training=True, momentum=0.3).sum().backward()
    assert not mean.any() and torch.equal(var, torch.ones(2).double())


def test_other_types_and_fixed_statistics_are_written_out():
    half = X.bfloat16()
    got = batch_norm(half, None, None, training=True)
    assert torch.equal(got, norms.batch_norm(half, None, None, training=True))
    mean, var = torch.zeros(2).double(), torch.ones(2).double()
    got = batch_norm(X, mean, var)
    torch.testing.assert_close(got, F.batch_norm(X, mean, var))


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["batch", "fixed", "instance", "group"])
def test_half_types_are_rounded_at_the_end_only(name, parameters):
    # A mean far from 0 beside the spread: bfloat16 has 8 bits for both.
    x = (50 + 3 * torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(1))).bfloat16()
    w, b = torch.randn(2, 4, generator=torch.Generator().manual_seed(2)).to(parameters)
    stats = torch.full((4,), 49.0).to(parameters), torch.full((4,), 8.0).to(parameters)
    theirs, ours = {
        "batch": (F.batch_norm, batch_norm),
        "fixed": (F.batch_norm, batch_norm),
        "instance": (F.instance_norm, instance_norm),
        "group": (F.group_norm, group_norm),
    }[name]
    given = {
        "batch": (None, None, w, b, True),
        "fixed": (*stats, w, b),
        "instance": (None, None, w, b),
        "group": (2, w, b),
    }[name]
    got = ours(x, *given)
    assert got.dtype == theirs(x, *given).dtype
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in (x, *given)]
    # Rounded once, at the end, to 8 bits. (torch rounds the mean too if it has no float32.)
    torch.testing.assert_close(got.double(), theirs(*wide), rtol=2**-8, atol=1e-5)


BAD = {
    "one value": (torch.ones(1, 2), {}, "more than 1 value per channel"),
    "weight": (torch.ones(3, 2), {"weight": torch.ones(1)}, "weight of a norm must have one"),
    "bias": (torch.ones(3, 2), {"bias": torch.ones(3)}, "bias of a norm must have one"),
    "half": (torch.ones(3, 2), {"running_mean": torch.ones(2)}, "both or not at all"),
    "eval": (torch.ones(3, 2), {"training": False}, "no statistics in eval mode"),
}


@pytest.mark.parametrize("norm", [batch_norm, norms.batch_norm])
@pytest.mark.parametrize("name", BAD)
def test_what_torch_refuses_is_refused(name, norm):
    x, given, message = BAD[name]
    given = {"running_mean": None, "running_var": None, "training": True} | given
    with pytest.raises((ValueError, RuntimeError)):
        F.batch_norm(x, **given)
    with pytest.raises(mf.errors.ProblemError, match=message):
        norm(x, **given)


def test_an_instance_of_one_value_is_refused():
    with pytest.raises(mf.errors.ProblemError, match="more than 1 value per channel"):
        instance_norm(torch.ones(3, 2, 1))


def test_it_keeps_its_input_alone():
    def graph(f):
        x = torch.randn(8, 4, 32, 32, requires_grad=True)
        return peak_bytes(lambda: f(x, None, None, training=True))[1] / (x.numel() * 4)

    # Its output, beside two numbers for each channel; the pieces keep their own results too.
    assert graph(batch_norm) < 1.1
    assert graph(norms.batch_norm) > 2


@pytest.mark.parametrize("estimator", [mf.FirstOrder(), mf.Unrolled()], ids=repr)
def test_a_cumulative_average_is_not_advanced(estimator):
    """`momentum=None` divides by the number of batches, which is not counted here."""
    found = []
    for momentum in (None, 0.1):
        layer = torch.nn.BatchNorm1d(2, momentum=momentum).double()

        def loss(fast, slow, x, layer=layer):
            return (torch.func.functional_call(layer, fast, (x,)) - slow["bias"]).square().mean()

        outer = {k: v.detach() + 0.5 for k, v in layer.named_parameters()}
        before = {k: v.clone() for k, v in layer.named_buffers()}
        meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=estimator)
        found.append(mf.hypergrad(meta)(outer, mf.Episode(X[..., 0], X[..., 1]))[0])
        assert all(torch.equal(v, before[k]) for k, v in layer.named_buffers())
    # In training mode the running statistics have no part in the value.
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
