"""Weights that `parametrise` shards, as far as one process shows it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import parametrizations

import metafocus as mf
from metafocus.errors import ProblemError
from metafocus.sharding import Sharding, plain_names, sharding_of
from metafocus.trainer.distributed import parametrise, whole_state


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Mixed(nn.Module):
    """Parameters beside children, and one that has two names in a module and a third elsewhere."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.again = self.scale
        self.last = nn.LayerNorm(3)
        self.last.weight = self.scale

    def forward(self, x):
        return self.last(self.first(x) * self.scale + self.again)


def test_the_order_of_the_parameters_stays(mesh):
    """In this order the states of an optimiser are saved, and resumed without shards."""
    model = Mixed()
    before = [name for name, _ in model.named_parameters()]
    assert before == ["scale", "first.weight", "first.bias", "last.bias"]
    parametrise(model, mesh)
    plain = plain_names(model)
    assert [plain[name] for name, _ in model.named_parameters()] == before


def test_tied_parameters_stay_tied(mesh):
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 3)
    want = model(x)
    expected = torch.autograd.grad(want.square().sum(), model.scale)[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parametrise(model, mesh)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    (scale,) = {id(p): p for n, p in model.named_parameters() if "scale" in n}.values()
    model(x).square().sum().backward()
    # Three uses add up in another order.
    torch.testing.assert_close(scale.grad.full_tensor(), expected, rtol=1e-6, atol=1e-6)
    found = whole_state(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["scale"] is found["again"] is found["last.weight"]


@pytest.mark.parametrize("own", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrizations_of_its_own_are_refused(mesh, own):
    model = nn.Sequential(nn.Linear(3, 3), own(nn.Linear(3, 3)))
    name = type(model[1].parametrizations.weight[0]).__name__
    with pytest.raises(ProblemError, match=rf"'1.weight' has a parametrization .*\({name}\)"):
        parametrise(model, mesh)
    assert sharding_of(model) == Sharding.NONE


def test_parametrizations_of_its_own_are_no_shards():
    model = parametrizations.weight_norm(nn.Linear(3, 3))
    assert plain_names(model) == {} and sharding_of(model) == Sharding.NONE


def loss(fast, slow, x):
    w = fast["w"]
    return ((x @ (w.full_tensor() if isinstance(w, DTensor) else w)).tanh() ** 2).mean()


def gradient(weight, estimator):
    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.5, 2), estimator=estimator)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    meta({"w": weight}, mf.Episode(x, x))[0].backward()
    return weight.grad


# Two steps solve nothing: here the same biased gradient is wanted.
@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
def test_fast_weights_that_are_sharded_are_exact_or_refused_in_words(mesh):
    whole = torch.linspace(0, 1, 16).reshape(4, 4)

    def sharded():
        return distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()

    for estimator in (mf.Unrolled(), mf.Unrolled(recompute=True), mf.Implicit(mf.CG(3))):
        want = gradient(whole.clone().requires_grad_(), estimator)
        got = gradient(sharded(), estimator).full_tensor()
        # The same products on one process.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    refused = (mf.hvp_forward, mf.hvp_finite(1e-3))
    for estimator in (*(mf.Unrolled(hvp=hvp) for hvp in refused), mf.EvoGrad(0.1)):
        with pytest.raises(ProblemError, match=r"fast weight 'w' is a DTensor.*hvp_reverse"):
            gradient(sharded(), estimator)
