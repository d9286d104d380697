"""What a loss reads is watched by `mf.compiled`: a change is followed, or refused by name."""

from __future__ import annotations

import array
import collections
import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

import metafocus as mf
from metafocus.closures import LONG, Unseen, closures_of
from metafocus.closures.reads import is_installed

pytestmark = pytest.mark.usefixtures("float64")


class Settings:
    """Numbers kept on a class."""

    rate = 1.0


class Base:
    slope = 1.0

    @property
    def factor(self):
        return FACTOR

    @staticmethod
    def shift(x):
        return x + SHIFT


@dataclasses.dataclass(slots=True)
class Slotted:
    rate: float = 1.0


class Net(Base, nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(rate=1.0)
        self.rates = [1.0]

    def forward(self, x):
        scale = self.slope * self.config.rate * self.rates[0] * self.factor * Settings.rate
        return self.shift(x * scale * WEIGHT)


class Attributes(dict):
    """A dict that holds attributes besides its entries."""


WEIGHT, FACTOR, SHIFT = 1.0, 1.0, 0.0
NET, SLOTTED, ATTRIBUTES = Net(), Slotted(), Attributes()
LONG_LIST, NESTED = [1.0] * (2 * LONG), [{"rate": 1.0} for _ in range(300)]
DEQUE, ARRAY = collections.deque([1.0]), array.array("d", [1.0])
ATTRIBUTES.rate = 1.0
settings = types.ModuleType("settings_of_a_user")
settings.rate = 1.0


def loss(fast, slow, x):
    w = fast["w"] * LONG_LIST[LONG + 1] * NESTED[7]["rate"] * DEQUE[0] * ARRAY[0]
    w = w * SLOTTED.rate * settings.rate * loss.rate * ATTRIBUTES.rate
    return ((NET(w) - x) ** 2).sum()


loss.rate = 1.0
HERE = sys.modules[__name__]
PLACES = {
    "class": (Settings, "rate"),
    "class of a module, inherited": (Base, "slope"),
    "object on a module": (NET.config, "rate"),
    "list on a module": (NET.rates, 0),
    "global in forward": (HERE, "WEIGHT"),
    "global in a property": (HERE, "FACTOR"),
    "global in a static method": (HERE, "SHIFT"),
    "slots": (SLOTTED, "rate"),
    "Python module": (settings, "rate"),
    "attribute of a function": (loss, "rate"),
    "attribute of a dict": (ATTRIBUTES, "rate"),
    "long list": (LONG_LIST, LONG + 1),
    "dict in a list": (NESTED[7], "rate"),
    "deque": (DEQUE, 0),
    "array": (ARRAY, 0),
}
W = {"w": torch.tensor([1.0], dtype=torch.float64)}
EPISODE = mf.Episode(torch.tensor([0.25]), torch.tensor([0.5]))


def gradient(inner, outer=None, estimator=None):
    problem = mf.Problem(inner, outer or inner)
    return mf.hypergrad(
        mf.bilevel(problem, solver=mf.SGD(0.05, 1), estimator=estimator or mf.Unrolled())
    )


def write(place, value):
    target, name = place
    if hasattr(target, str(name)):
        setattr(target, name, value)
    else:
        target[name] = value


@pytest.mark.parametrize("name", PLACES)
def test_a_number_that_changes_is_followed(name):
    target, key = PLACES[name]
    before = getattr(target, key) if hasattr(target, str(key)) else target[key]
    eager = gradient(loss)
    fast = mf.compiled(eager, backend="eager")
    first = fast(W, EPISODE)[0]["w"]
    try:
        write(PLACES[name], before + 1.0)
        got, want = fast(W, EPISODE)[0]["w"], eager(W, EPISODE)[0]["w"]
    finally:
        write(PLACES[name], before)
    # Float64: the graph may add in another order.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got, first, rtol=0.01)


def test_values_that_are_equal_but_not_the_same_are_told_apart():
    number = [0.0]

    def signed(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum() * torch.tensor(number[0]).copysign(
            torch.tensor(1.0)
        ) + torch.atan2(torch.tensor(number[0]), -fast["w"]).sum()

    eager = gradient(signed)
    fast = mf.compiled(eager, backend="eager")
    before = fast(W, EPISODE)[1][0]
    number[0] = -0.0
    assert torch.equal(fast(W, EPISODE)[1][0], eager(W, EPISODE)[1][0])
    assert not torch.allclose(before, fast(W, EPISODE)[1][0])


def two(fast, slow, x):
    # A frozen weight is not in `fast`.
    return ((fast["w"] * fast.get("v", slow["v"]) - x) ** 2).sum()


@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.FirstOrder(), mf.Implicit(mf.CG(2))])
@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("tasks", [False, True])
def test_frozen_parameters_stay_frozen(estimator, tasks):
    outer = {k: nn.Parameter(torch.tensor([1.5])) for k in ("w", "v")}
    problem = mf.Problem(mf.proximal(two, 1.0), two)
    meta = mf.bilevel(problem, solver=mf.SGD(0.05, 2), estimator=estimator)
    eager = mf.hypergrad(mf.over_tasks(meta) if tasks else meta)
    episode = mf.stack_episodes([EPISODE, EPISODE]) if tasks else EPISODE
    fast = mf.compiled(eager, backend="eager")
    for moving in (True, False, True):
        outer["v"].requires_grad_(moving)
        got, want = fast(outer, episode), eager(outer, episode)
        for k in outer:
            # The order of a few additions may differ.
            torch.testing.assert_close(got[0][k], want[0][k].detach(), rtol=1e-12, atol=1e-12)
        assert bool(got[0]["v"].any()) is moving
        assert set(got[1][1].params) == set(want[1][1].params) == set("wv" if moving else "w")


def test_a_parameter_that_an_init_asks_for_is_followed():
    """An `init` of the user's own decides by a parameter that it closes over."""
    own = {k: nn.Parameter(torch.tensor([1.5])) for k in ("w", "v")}
    problem = mf.Problem(
        two, two, init=lambda slow, _: {k: slow[k] for k, v in own.items() if v.requires_grad}
    )
    eager = mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.05, 1), estimator=mf.FirstOrder()))
    fast = mf.compiled(eager, backend="eager")
    outer = {k: v.detach() for k, v in own.items()}
    fast(outer, EPISODE)
    own["v"].requires_grad_(False)
    assert torch.equal(fast(outer, EPISODE)[0]["w"], eager(outer, EPISODE)[0]["w"])


def test_what_cannot_be_watched_is_refused_by_name():
    rates = iter([0.1] * 100)

    def drawn(fast, slow, x):
        return next(rates) * ((fast["w"] - x) ** 2).sum()

    with pytest.raises(mf.errors.TransformError, match=r"rates is a list_iterator"):
        mf.compiled(gradient(drawn), backend="eager")(W, EPISODE)
    table = [{"rate": 1.0} for _ in range(LONG + 1)]

    def looked_up(fast, slow, x):
        return table[3]["rate"] * ((fast["w"] - x) ** 2).sum()

    with pytest.raises(mf.errors.TransformError, match=r"table is a list that may"):
        mf.compiled(gradient(looked_up), backend="eager")(W, EPISODE)


def test_large_arrays_are_refused_and_log_files_are_not(tmp_path):
    large = array.array("d", [1.0] * 2**18)
    assert isinstance(closures_of(lambda: large)["<lambda>.large"], Unseen)
    with open(tmp_path / "log", "w") as log:
        found = closures_of(lambda: log)
    assert not any(isinstance(x, Unseen) for x in found.values())


def test_names_of_attributes_are_not_taken_for_globals():
    """`x.DEQUE` reads no global."""
    assert not any("DEQUE" in name for name in closures_of(lambda x: x.DEQUE))


def test_annotations_are_not_what_a_loss_reads():
    """Python 3.14 keeps them on the class, from the first time on that somebody reads them."""
    made = {"__annotate_func__": lambda form: {"rate": float}, "rate": 1.0}
    kind = type("Lazy", (), made)
    before = closures_of(lambda: kind.rate)
    assert any(name.endswith(".rate") for name in before)
    type.__setattr__(kind, "__annotations_cache__", {"rate": float})
    assert closures_of(lambda: kind.rate).keys() == before.keys()


def test_one_walk_ends_and_two_agree():
    assert closures_of(loss) == closures_of(loss)
    assert closures_of(NET) == closures_of(NET)


@pytest.mark.parametrize(
    ("file", "installed"),
    [
        (torch.__file__, True),
        (pytest.__file__, True),
        (dataclasses.__file__, True),
        ("/home/me/.local/lib/python3.12/site-packages/other/core.py", True),
        ("/usr/lib/python3/dist-packages/other/core.py", True),
        (__file__, False),
        ("/home/me/project/train.py", False),
        (mf.__file__, False),
    ],
)
def test_which_files_belong_to_installed_packages(file, installed):
    module = "metafocus" if file == mf.__file__ else "some_module"
    assert is_installed(module, file) is installed
