"""Arithmetic on dicts of tensors, and pytrees taken apart and put together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import metafocus as mf
from metafocus import params as pt

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4)


def params(shapes, seed):
    g = torch.Generator().manual_seed(seed)
    return {f"p.{i}": torch.randn(s, generator=g).double() for i, s in enumerate(shapes)}


def vector(a):
    return torch.cat([torch.zeros(0), *(v.reshape(-1) for v in a.values())])


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.floats(-3, 3))
def test_arithmetic_is_that_of_vectors(shapes, factor):
    a, b = params(shapes, 0), params(shapes, 1)
    x, y = vector(a), vector(b)
    # Entry by entry the same operations; only the sums of dot run in another order.
    assert torch.equal(vector(pt.add(a, b, factor)), x + factor * y)
    assert torch.equal(vector(pt.sub(a, b)), x - y)
    assert torch.equal(vector(pt.scale(a, factor)), factor * x)
    assert not vector(pt.zeros_like(a)).any()
    assert abs(pt.dot(a, b) - x @ y) <= 1e-14 * (1 + x.norm() * y.norm())
    assert abs(pt.norm(a) - x.norm()) <= 1e-14 * (1 + x.norm())
    for result in (pt.add(a, b), pt.sub(a, b), pt.scale(a, 2.0), pt.zeros_like(a)):
        assert list(result) == list(a)
        assert [v.shape for v in result.values()] == [v.shape for v in a.values()]
    assert pt.dot(a, b).shape == pt.norm(a).shape == ()


def test_arithmetic_does_not_touch_its_arguments():
    a, b = params([[2]], 0), params([[2]], 1)
    kept = {k: v.clone() for k, v in a.items()}
    pt.add(a, b, 2.0), pt.sub(a, b), pt.scale(a, 3.0), pt.zeros_like(a)
    assert torch.equal(a["p.0"], kept["p.0"])


def test_scale_and_add_are_differentiable_by_their_factor():
    a = {"x": torch.tensor([1.0, 2.0])}
    grad = torch.func.grad(lambda s: pt.dot(pt.add(a, a, s), a))(torch.tensor(1.0))
    assert grad.item() == 5.0


@pytest.mark.parametrize("level", ["tape", "grad", "jvp", "grad(grad)", "vmap"])
def test_detach_cuts_every_level(level):
    def f(x):
        return (pt.detach({"a": x, "n": 3})["a"] ** 2).sum()

    x = torch.ones(3)
    if level == "tape":
        assert not f(x.requires_grad_()).requires_grad
    elif level == "grad":
        assert not torch.func.grad(f)(x).any()
    elif level == "jvp":
        assert torch.func.jvp(f, (x,), (x,))[1] == 0
    elif level == "vmap":
        assert not torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3)).any()
    else:
        # Detached from the outer level also when it happens inside the inner one.
        inner = torch.func.grad(lambda x, y: (y * pt.detach(x)).sum(), argnums=1)
        assert not torch.func.grad(lambda x: inner(x, torch.ones(3)).sum())(x).any()


TREES = st.recursive(
    st.one_of(
        st.just(None),
        st.integers(),
        st.just("text"),
        st.builds(lambda n: torch.arange(n), st.integers(0, 3)),
        st.builds(lambda n: torch.ones(n), st.integers(0, 3)),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.text(max_size=2), children, max_size=3),
        st.builds(lambda a, b: mf.Episode(a, b), children, children),
    ),
    max_leaves=8,
)


def same(a, b):
    left, spec = pytree.tree_flatten(a)
    right, other = pytree.tree_flatten(b)
    return spec == other and all(x is y for x, y in zip(left, right, strict=True))


@settings(deadline=None, max_examples=100)
@given(TREES)
def test_partition_and_rebuild_are_inverse(data):
    picked, rebuild = pt.partition(data)
    assert same(rebuild(picked), data)
    assert all(x is y for x, y in zip(picked, pt.tensors(data), strict=True))
    floats, put = pt.partition(data, torch.is_floating_point)
    assert same(put(floats), data)
    assert all(x.is_floating_point() for x in floats)
    assert len(pt.leaves(data)) >= len(picked) >= len(floats)


def test_rebuild_wants_exactly_as_many_leaves():
    _, rebuild = pt.partition({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"shorter|longer|argument"):
        rebuild([torch.ones(1)])
