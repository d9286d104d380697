"""Streams under the estimators that look at the solution only: refused, or told what to look at."""

from __future__ import annotations

import copy

import loops
import pytest
import torch
from loops import (
    PROBLEM,
    STREAMS,
    Single,
    batches_of,
    by_hand,
    meta_of,
    slices,
    start,
    stream_of,
    upper,
)
from problems import Case, assert_close
from ways import HVPS, ONE, STEPS, WAYS, expected

import metafocus as mf

CASE = loops.case()


# --- estimators of the solution -----------------------------------------------------------------


def descended(fast, slow, data):
    """A map with the same fixed point as descent on the inner loss."""
    gradient = torch.func.grad(lambda f: loops.inner(f, slow, data))(fast)
    return {k: v - 0.1 * gradient[k] for k, v in fast.items()}


def first_batch(stream):
    return stream.at(0)


WITHOUT = {
    "Implicit": lambda **data: mf.Implicit(mf.CG(3), **data),
    "FixedPoint": lambda **data: mf.FixedPoint(descended, mf.Neumann(3, 1.0), **data),
    "OneStep": lambda **data: mf.OneStep(descended, **data),
    "Penalty": lambda **data: mf.Penalty(100.0, **data),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", WITHOUT)
def test_estimators_of_the_solution_refuse_a_stream_by_name(name, kind):
    episode = mf.Episode(stream_of(kind, CASE.episode().support), CASE.episode().query)
    with pytest.raises(mf.errors.ProblemError, match=rf"{name} .*stream.*Pass data="):
        meta_of(WITHOUT[name]())(CASE.outer, episode)


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WITHOUT)
def test_with_data_they_differentiate_on_what_it_returns(name, way):
    """The same derivative as of the problem with this one batch, at the same solution.

    `mf.Given` brings the solution, so that both problems have it.
    """
    loss = mf.proximal(loops.inner, 1.0)

    def solution(slow, stream):
        return {k: slow[k] + 0.1 for k in ("w1", "w2")}

    problem = mf.Problem(loss, upper, start)
    nudging = {"solver": mf.SGD(0.1, 20)} if name == "Penalty" else {}
    metas = [
        mf.bilevel(problem, solver=mf.Given(solution), estimator=WITHOUT[name](**nudging, **data))
        for data in ({"data": first_batch}, {})
    ]
    if name == "Penalty":
        # The nudged problem goes down the stream; one batch for all of its steps.
        still = CASE.episodes.support.tree
        many = tuple(x[:, :1].expand(-1, 20, *x.shape[2:]) for x in still)
    else:
        many = CASE.episodes.support.tree
    query = mf.Episode(None, tuple(x[:, 0] for x in CASE.episodes.query.tree)).query
    streamed = Case(problem, CASE.outer, mf.Episode(mf.PerStep(many), query))
    single = tuple(x[:, 0] for x in CASE.episodes.support.tree)
    plain = Case(problem, CASE.outer, mf.Episode(single, query))
    got, want = WAYS[way](metas[0], streamed), WAYS[way](metas[1], plain)
    # The same operations on the same numbers; Penalty enlarges rounding by its strength.
    assert_close(got, want, 1e-10 if name == "Penalty" else 1e-13)


def test_data_may_be_any_function_of_the_stream():
    def everything(stream):
        return tuple(x.flatten(0, 1) for x in stream.tree)

    episode = CASE.episode()
    meta = meta_of(mf.Implicit(mf.CG(3), data=everything))
    with pytest.warns(mf.errors.NotStationaryWarning):
        got = mf.hypergrad(meta)(CASE.outer, episode)[0]
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    fast = by_hand(start(leaves, None), leaves, slices(episode.support))[-1]
    fast = {k: v.detach() for k, v in fast.items()}
    plain = mf.bilevel(
        PROBLEM, solver=mf.Given(lambda slow, s: fast), estimator=mf.Implicit(mf.CG(3))
    )
    last = mf.Episode(everything(episode.support), slices(episode.query)[-1])
    with pytest.warns(mf.errors.NotStationaryWarning):
        assert_close(got, mf.hypergrad(plain)(CASE.outer, last)[0], 1e-12)


# --- stocBiO ------------------------------------------------------------------------------------


def stocbio(outer, batches, query, scale, terms):
    """`direct - M' x` with `x = scale sum_q prod_(j<q) (I - scale H_j) v`, by hand.

    Every product has the data of its own step, of those after the inner ones; the last of them is
    that of the mixed product.
    """
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    fast = by_hand(start(leaves, None), leaves, batches[:STEPS])[-1]
    fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
    names = list(fast)
    loss = upper(fast, leaves, query)
    both = torch.autograd.grad(
        loss, [*fast.values(), *leaves.values()], allow_unused=True, materialize_grads=True
    )
    right, direct = dict(zip(names, both, strict=False)), both[len(names) :]

    def gradient(step):
        value = loops.inner(fast, leaves, batches[step])
        return torch.autograd.grad(value, list(fast.values()), create_graph=True)

    x = {k: scale * v for k, v in right.items()}
    step = STEPS
    for _ in range(terms - 1):
        product = torch.autograd.grad(gradient(step), list(fast.values()), list(x.values()))
        x = {k: x[k] + scale * (right[k] - p) for k, p in zip(names, product, strict=True)}
        step += 1
    mixed = torch.autograd.grad(
        gradient(step),
        list(leaves.values()),
        list(x.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    return {k: d - m for k, d, m in zip(leaves, direct, mixed, strict=True)}


@pytest.mark.parametrize("hvp", ["reverse", "forward", "finite"])
@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("kind", ["PerStep", "Batches"])
def test_new_data_for_each_product_is_stocbio(kind, terms, hvp):
    case = loops.case(tasks=3, steps=STEPS + 4)
    estimator = mf.Implicit(mf.Neumann(terms, 0.2), HVPS[hvp], data="each product")
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator)
    query = tuple(x[:, 0] for x in case.episodes.query.tree)
    supports = [slices(case.episode(i).support) for i in range(case.tasks)]
    want = [
        stocbio(case.outer, batches, tuple(x[i] for x in query), 0.2, terms)
        for i, batches in enumerate(supports)
    ]
    ways = WAYS if kind == "PerStep" else ONE
    for way, differentiate in ways.items():
        many = Case(PROBLEM, case.outer, mf.Episode(case.episodes.support, query))
        if kind == "Batches":
            episode = mf.Episode(batches_of(supports[0]), tuple(x[0] for x in query))
            many = Single(PROBLEM, case.outer, episode)
        # Finite differences: u^(2/3) of the third derivative, once for each product.
        bound = 1e-7 if hvp == "finite" else 1e-11
        assert_close(differentiate(meta, many), expected(want, way), bound)


def test_new_data_for_each_product_needs_neumann_and_a_stream():
    with pytest.raises(ValueError, match=r"each product.*only Neumann.*CG"):
        mf.Implicit(mf.CG(3), data="each product")
    with pytest.raises(ValueError, match=r"data must be.*'every one'"):
        mf.Implicit(mf.Neumann(2, 0.1), data="every one")
    meta = meta_of(mf.Implicit(mf.Neumann(2, 0.1), data="each product"))
    with pytest.raises(mf.errors.ProblemError, match=r"each product.*must be a stream.*tuple"):
        meta(CASE.outer, mf.Episode(slices(CASE.episode().support)[0], CASE.episode().query))


def test_new_data_for_each_product_refuses_what_it_does_not_have():
    case = loops.case(steps=STEPS + 4)
    meta = meta_of(mf.Implicit(mf.Neumann(2, 0.1), data="each product"))
    leaves = {k: v.clone().requires_grad_() for k, v in case.outer.items()}
    loss, _ = meta(leaves, case.episode())
    first = torch.autograd.grad(loss, leaves["w1"], create_graph=True)[0]
    with pytest.raises(mf.errors.TransformError, match=r"each product.*first derivatives"):
        torch.autograd.grad(first.sum(), leaves["w1"])
    with pytest.raises(mf.errors.TransformError, match=r"each product.*first derivatives"):
        torch.func.jvp(
            lambda o: meta(o, case.episode())[0], (case.outer,), (copy.deepcopy(case.outer),)
        )
