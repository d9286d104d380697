"""`mf.explain`: what a call does, found by making it; nothing that it leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import build, chat_batch

import metafocus as mf


def loss(fast, slow, data):
    x, y = data
    return F.mse_loss(torch.tanh(x @ fast["w"]), y)


def parts(estimator, **options):
    return mf.bilevel(
        mf.Problem(loss, loss), solver=mf.SGD(0.1, steps=3), estimator=estimator, **options
    )


def episode(*lead):
    torch.manual_seed(0)
    return mf.Episode(*((torch.randn(*lead, 6, 4), torch.randn(*lead, 6)) for _ in range(2)))


OUTER = {"w": torch.ones(4)}


def test_estimator_solver_and_data_are_named():
    found = mf.explain(parts(mf.FirstOrder()), OUTER, episode()).topics
    assert found["estimator"] == (
        "FirstOrder(): differentiates all that the tape records; takes first derivatives of the "
        "inner loss",
    )
    assert found["inner solver"][0].startswith("SGD(lr=0.1, steps=3")
    assert found["outer parameters"][0].startswith("1 tensors of 4 numbers, float32 on cpu")
    assert found["support"] == ("the same at each step, 2 tensors of 30 numbers, float32 on cpu",)
    assert found["hypergradient"] == ("not zero in 1 of 1 outer parameters",)
    assert "path" not in found


def test_a_parameter_without_an_effect_is_named():
    def start(slow, support):
        return {"w": slow["w"]}

    meta = mf.bilevel(mf.Problem(loss, loss, start), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    outer = {**OUTER, "unused": torch.zeros(2)}
    lines = mf.explain(meta, outer, episode()).topics["hypergradient"]
    assert lines == ("not zero in 1 of 2 outer parameters; zero in unused",)


@pytest.mark.parametrize(
    ("estimator", "replaced"),
    [
        (mf.Unrolled(), ("none is replaced",)),
        (mf.Unrolled(hvp=mf.hvp_forward), ("mse_loss: replaced by an exact composite",)),
    ],
    ids=str,
)
def test_operators_that_are_replaced(estimator, replaced):
    """Forward mode has no formula for mse_loss; in reverse mode the kernel itself is right."""
    assert mf.explain(parts(estimator), OUTER, episode()).topics["operators"] == replaced


def test_batch_norm_keeps_its_statistics():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    def norm_loss(fast, slow, data):
        return F.mse_loss(torch.func.functional_call(net, fast, (data[0],)).sum(-1) ** 2, data[1])

    meta = mf.bilevel(
        mf.Problem(norm_loss, norm_loss), solver=mf.SGD(0.1, 2), estimator=mf.FirstOrder()
    )
    before = net[1].running_mean.clone()
    found = mf.explain(meta, mf.trainable(net), episode()).topics
    assert "batch_norm: leaves its running statistics alone" in found["operators"]
    assert len(found["preflight"]) == 2
    assert torch.equal(net[1].running_mean, before)


class Square(torch.autograd.Function):
    """A kernel of the user's, with a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_custom_kernels_are_named_and_judged():
    def squared(fast, slow, data):
        return Square.apply(data[0] @ fast["w"]).mean()

    def lines(estimator):
        meta = mf.bilevel(mf.Problem(squared, squared), solver=mf.SGD(0.01, 2), estimator=estimator)
        return mf.explain(meta, outer, double).topics["custom kernels"]

    double = mf.Episode(*(tuple(x.double() for x in part) for part in episode()))
    outer = {"w": torch.ones(4, dtype=torch.float64)}
    (name,) = lines(mf.FirstOrder())
    assert "Square" in name
    agree = "their second derivatives agree with a central difference"
    assert lines(mf.Unrolled()) == (name, agree)
    with mf.trust():
        assert "were not checked" in lines(mf.Unrolled())[-1]


def test_what_the_preflight_refuses_is_raised():
    hidden = torch.ones(4, requires_grad=True)

    def closed(fast, slow, data):
        return loss({"w": fast["w"] * hidden}, slow, data)

    meta = mf.bilevel(
        mf.Problem(closed, closed), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled(recompute=True)
    )
    with pytest.raises(mf.errors.ClosureError):
        mf.explain(meta, OUTER, episode())


def test_the_checks_run_again_although_they_ran_before():
    meta = parts(mf.Unrolled(recompute=True))
    first = mf.explain(meta, OUTER, episode())
    mf.hypergrad(meta)(OUTER, episode())
    assert mf.explain(meta, OUTER, episode()) == first
    assert any("closes over no tensor" in line for line in first.topics["preflight"])


@pytest.mark.parametrize(
    ("options", "chunks"),
    [
        ({}, "1 chunks of at most 5, how='vmap'"),
        ({"chunk_size": 2}, "3 chunks of at most 2, how='vmap'"),
        ({"how": "loop"}, "5 chunks of at most 1, how='loop'"),
    ],
    ids=str,
)
def test_tasks_and_chunks(options, chunks):
    meta = mf.over_tasks(parts(mf.Unrolled()), **options)
    # A function of the user's around it hides nothing.
    found = mf.explain(lambda *given: meta(*given), OUTER, episode(5)).topics
    assert found["tasks"] == (f"5 in {chunks}, randomness='error'",)
    assert len(found["estimator"]) == 1


def test_streams_and_paths():
    x = torch.randn(3, 6, 4)
    support = mf.zipped(mf.PerStep(x), mf.Batches(lambda step: x[step, :, 0], steps=3))
    meta = parts(mf.Unrolled(), path=[1.0, 1.0, 1.0])
    found = mf.explain(meta, OUTER, mf.Episode(support, episode().query)).topics
    assert found["support"] == (
        "several streams side by side: PerStep: a slice for each step, 1 tensors of 72 numbers, "
        "float32 on cpu; a stream of type Batches: asked for data at each step",
    )
    assert found["path"]


def test_nothing_changes():
    """Neither gradients nor random numbers: a training goes on as if it had not been explained."""
    model, batch = build(dtype=torch.float32), chat_batch()
    both = mf.Episode(batch, batch)

    def next_loss(explained):
        meta = mf.recipes.focusft(model, generator=torch.Generator().manual_seed(3))
        if explained:
            before = torch.get_rng_state()
            mf.explain(meta, {}, both)
            assert torch.equal(torch.get_rng_state(), before)
        return meta({}, both)[0]

    assert torch.equal(next_loss(True), next_loss(False))
    assert all(p.grad is None for p in model.parameters())


def test_focusft_shares_layers_and_names_the_kernel_of_spans():
    model, batch = build(dtype=torch.float32), chat_batch()
    found = mf.explain(mf.recipes.focusft(model), {}, mf.Episode(batch, batch)).topics
    assert found["shared layers"][0].startswith("model.layers.0 to model.layers.")
    assert "attention" not in found
    assert "hypergradient" not in found  # outer={}: the gradients would be the model's own


def test_it_is_printed_in_lines_of_a_page():
    text = str(mf.explain(parts(mf.Unrolled(recompute=True)), OUTER, episode()))
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].startswith("estimator")
