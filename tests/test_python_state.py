"""Losses with a state in Python: one that matters is refused, a log or a cache is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import weight_norm

import metafocus as mf
from metafocus.errors import ProblemError

pytestmark = pytest.mark.usefixtures("float64")

RUN_AGAIN = {
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "implicit": mf.Implicit(mf.CG(3)),
    "penalty": mf.Penalty(10.0),
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.calls, self.seen, self.cache = 0, [], {}


class Annealed(Layer):
    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + 0.1 * self.calls)


class Remembers(Layer):
    def forward(self, x):
        self.seen.append(x.detach().mean(0))
        return self.linear(x - sum(self.seen))


class Logs(Layer):
    def forward(self, x):
        self.calls += 1
        self.seen.append(float(x.mean()))
        return self.linear(x)


class Caches(Layer):
    def forward(self, x):
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.arange(len(x))[:, None].double()
        return self.linear(x) + self.cache[len(x)]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.rnn(x[:, None])[0][:, 0])


X, Y = torch.linspace(-1, 1, 15).view(5, 3).double(), torch.linspace(0, 1, 5).view(5, 1).double()


def gradient(net, estimator):
    def loss(fast, slow, data):
        return ((functional_call(net, fast, (data[0],)) - data[1]) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 3), estimator=estimator)
    grads = mf.hypergrad(meta)(mf.trainable(net), mf.Episode((X, Y), (X, Y)))[0]
    return torch.cat([g.reshape(-1) for g in grads.values()])


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("estimator", RUN_AGAIN)
@pytest.mark.parametrize(("net", "name"), [(Annealed, "calls"), (Remembers, r"seen")])
def test_a_state_that_changes_the_loss_is_refused_where_it_is_run_again(net, name, estimator):
    with pytest.raises(ProblemError, match=rf"inner_loss changes .*{name}.* hidden state"):
        gradient(net(), RUN_AGAIN[estimator])


HARMLESS = {
    "a log": Logs,
    "a cache": Caches,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    # Its hook computes the weight anew, as an attribute of the module.
    "weight_norm by hooks": lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("estimator", ["recompute", "forward"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_loss_is_let_through_and_exact(name, estimator):
    torch.manual_seed(0)
    net = HARMLESS[name]()
    found, exact = (gradient(net, e) for e in (RUN_AGAIN[estimator], mf.Unrolled()))
    # Other orders of the same sums.
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


def test_on_the_tape_a_counter_is_no_matter():
    assert gradient(Annealed(), mf.Unrolled()).isfinite().all()
