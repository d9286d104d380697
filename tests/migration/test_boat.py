"""Each pair of docs/migration/boat.md gives equal tensors in float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import metafocus as mf
from migration import pairs

pairs.rival("boat_torch")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """BOAT imports losses by name: the page's functions go into a module of that name."""
    module = types.ModuleType("my_losses")
    monkeypatch.setitem(sys.modules, "my_losses", module)
    monkeypatch.chdir(tmp_path)
    return {"my_losses": module}


@pytest.mark.parametrize("title", pairs.idioms("boat"))
@pytest.mark.filterwarnings("ignore")
def test_pair(title, page):
    pairs.check("boat", title, **page)


@pytest.mark.filterwarnings("ignore")
def test_rgt_walks_a_straight_line(page):
    """What the page says of truncation in boat-torch 1.1.1, so that a repaired one is noticed."""
    names = pairs.setup("boat", **page)
    batches = names["one"][0], names["other"][0]
    losses = ("penalised", "validation")
    settings = {"RGT": {"truncate_iter": 15}}
    models = names["Weights"](), names["Penalty"]()
    (theirs,) = names["boat"](*models, losses, batches, 20, ["RGT", "RAD"], **settings)

    hyper, log_l2, episode = names["hyper"], names["log_l2"], names["episode"]
    start = hyper.init(log_l2, episode.support)
    slope = torch.func.grad(hyper.inner_loss)(start, log_l2, episode.support)

    def gradient(head):
        """The last 5 steps differentiated, from where the first 15 lead."""
        problem = mf.Problem(hyper.inner_loss, hyper.outer_loss, init=lambda slow, support: head)
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 5), estimator=mf.Unrolled())
        return mf.hypergrad(meta)(log_l2, episode)[0]["log_l2"]

    straight = gradient({k: v - 15 * 0.1 * slope[k] for k, v in start.items()})
    torch.testing.assert_close(theirs, straight, rtol=1e-9, atol=1e-12)
    descent = mf.adapt(hyper, log_l2, episode.support, solver=mf.SGD(0.1, 15)).params
    published = gradient(descent)
    meta = mf.bilevel(hyper, solver=mf.SGD(0.1, 20), estimator=mf.Unrolled(last=5))
    ours = mf.hypergrad(meta)(log_l2, episode)[0]["log_l2"]
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=1e-12)
    assert (theirs - published).norm() > 0.1 * published.norm()
