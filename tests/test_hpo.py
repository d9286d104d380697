"""Hyper-parameter recipes against closed forms of ridge regression, derived by plain autograd."""

from __future__ import annotations

import pytest
import torch
from problems import F64, assert_close

import metafocus as mf
from metafocus.errors import ProblemError
from metafocus.recipes import hpo

pytestmark = pytest.mark.usefixtures("float64")

ROWS, DIM, OUT = 12, 4, 2


def data(seed):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, DIM, generator=g, dtype=F64),
        torch.randn(ROWS, OUT, generator=g, dtype=F64),
    )


EPISODE = mf.Episode(*(data(seed) for seed in (0, 1)))


def losses(params, data):
    x, y = data
    return ((x @ params["w"] - y) ** 2).sum(1) / 2


def loss(params, data):
    return losses(params, data).mean()


def start():
    return {"w": torch.zeros(DIM, OUT)}


def implicit(problem, outer, episode, steps=4000):
    meta = mf.bilevel(
        problem, solver=mf.SGD(0.1, steps), estimator=mf.Implicit(mf.CG(2 * DIM * OUT))
    )
    return mf.hypergrad(meta)(outer, episode)


def derived(closed_form, outer):
    """The value and gradient of the query loss at a closed-form solution."""
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    value = loss({"w": closed_form(leaves)}, EPISODE.query)
    grads = torch.autograd.grad(value, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True)), value.detach()


# --- learned regularisation -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (OUT,), (DIM, 1), (DIM, OUT)], ids=str)
def test_log_l2_is_the_hypergradient_of_ridge_regression(shape):
    outer = {"log_l2.w": torch.randn(shape, generator=torch.Generator().manual_seed(2))}
    x, y = EPISODE.support

    def ridge(leaves):
        penalty = leaves["log_l2.w"].exp().expand(DIM, OUT)
        columns = [
            torch.linalg.solve(x.mT @ x / ROWS + torch.diag(penalty[:, j]), x.mT @ y[:, j] / ROWS)
            for j in range(OUT)
        ]
        return torch.stack(columns, 1)

    grads, (value, aux) = implicit(hpo.log_l2(loss, start), outer, EPISODE)
    want, exact = derived(ridge, outer)
    # A converged solution, and conjugate gradients with more steps than unknowns.
    assert_close(aux.params["w"], ridge(outer), 1e-10)
    assert_close(value, exact, 1e-10)
    assert_close(grads, want, 1e-9)


def test_log_l2_of_some_weights_leaves_the_others_free():
    def with_bias(params, data):
        x, y = data
        return ((x @ params["w"] + params["b"] - y) ** 2).sum(1).mean() / 2

    problem = hpo.log_l2(with_bias, lambda: start() | {"b": torch.zeros(OUT)})
    # Penalised out of existence, the weight leaves the mean to the bias.
    _, (_, aux) = implicit(problem, {"log_l2.w": torch.tensor(2.9)}, EPISODE)
    free = aux.params["b"]
    solved = (EPISODE.support[1] - EPISODE.support[0] @ aux.params["w"]).mean(0)
    assert_close(free, solved, 1e-10)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"log_l2.v": torch.zeros(())}, r"penalties are named log_l2\.<name>.*\['w'\]"),
        ({"l2": torch.zeros(())}, r"penalties are named log_l2\.<name>"),
        ({"log_l2.w": torch.zeros(3, DIM, OUT)}, r"log_l2\.w of shape \[3, 4, 2\]"),
        ({"log_l2.w": torch.zeros(3)}, r"log_l2\.w of shape \[3\] does not broadcast"),
    ],
    ids=["unknown", "no prefix", "too large", "misfit"],
)
def test_log_l2_refuses_penalties_that_do_not_fit(outer, message):
    with pytest.raises(ProblemError, match=message):
        implicit(hpo.log_l2(loss, start), outer, EPISODE, steps=1)


# --- weights of data ------------------------------------------------------------------------------

L2 = 0.3


@pytest.mark.parametrize("groups", [ROWS, 3])
def test_reweight_is_the_hypergradient_of_weighted_ridge_regression(groups):
    group = torch.arange(ROWS) % groups
    outer = {"weight": torch.randn(groups, generator=torch.Generator().manual_seed(3))}
    x, y = EPISODE.support

    def ridge(leaves):
        weighted = torch.diag(leaves["weight"].sigmoid()[group]) / ROWS
        return torch.linalg.solve(x.mT @ weighted @ x + L2 * torch.eye(DIM), x.mT @ weighted @ y)

    problem = hpo.reweight(losses, start, l2=L2)
    episode = mf.Episode((group, (x, y)), EPISODE.query)
    grads, (value, aux) = implicit(problem, outer, episode)
    want, exact = derived(ridge, outer)
    assert_close(aux.params["w"], ridge(outer), 1e-10)
    assert_close(value, exact, 1e-10)
    assert_close(grads, want, 1e-9)


def test_reweight_runs_in_mini_batches_and_in_single_loop_methods():
    problem, outer = hpo.reweight(losses, start, l2=L2), {"weight": torch.zeros(ROWS)}
    part = torch.tensor([1, 5, 7])
    batch = mf.Episode((part, tuple(v[part] for v in EPISODE.support)), EPISODE.query)
    grads, _ = implicit(problem, outer, batch)
    assert (grads["weight"] != 0).nonzero().flatten().tolist() == part.tolist()
    soba = mf.algorithms.SOBA(problem, inner_lr=0.1, v_lr=0.1)
    state = soba.init(outer)
    whole = mf.Episode((torch.arange(ROWS), EPISODE.support), EPISODE.query)
    for _ in range(2000):
        found, state, _ = soba.step(outer, state, whole)
    want, _ = implicit(problem, outer, whole)
    assert_close(found, want, 1e-8)


def test_reweight_refuses():
    problem = hpo.reweight(losses, start)
    episode = mf.Episode((torch.arange(ROWS), EPISODE.support), EPISODE.query)
    with pytest.raises(ProblemError, match='outer must hold "weight"'):
        implicit(problem, {"logits": torch.zeros(ROWS)}, episode, steps=1)
    with pytest.raises(ProblemError, match=r"one value for each of the groups \[12\], got shape"):
        implicit(hpo.reweight(loss, start), {"weight": torch.zeros(ROWS)}, episode, steps=1)
    with pytest.raises(ValueError, match="l2 must be >= 0, got -1"):
        hpo.reweight(losses, start, l2=-1)


# --- learned data ---------------------------------------------------------------------------------


def test_distill_learns_examples_through_training():
    labels = torch.eye(OUT)
    outer = {"x": torch.randn(OUT, DIM, generator=torch.Generator().manual_seed(4))}
    solver = mf.SGD(0.1, 5)
    problem = hpo.distill(loss, start, labels)
    meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled(recompute=True))
    episode = mf.Episode(None, EPISODE.query)
    grads, _ = mf.hypergrad(meta)(outer, episode)

    def descend(leaves):
        w, x = start()["w"], leaves["x"]
        for _ in range(5):
            w = w - 0.1 * x.mT @ (x @ w - labels) / OUT
        return w

    assert_close(grads, derived(descend, outer)[0], 1e-12)
