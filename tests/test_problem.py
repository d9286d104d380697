"""Problem, proximal and the checks of what users hand in."""

from __future__ import annotations

import pytest
import torch

import metafocus as mf
from metafocus.checks import check_finite
from metafocus.problem import check_params

pytestmark = pytest.mark.usefixtures("float64")


def loss(fast, slow, x):
    return (fast["w"] * x).sum()


def test_proximal_adds_half_the_squared_distance():
    slow = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([[3.0]]), "other": torch.ones(5)}
    fast = {"w": torch.tensor([2.0, 4.0]), "v": torch.tensor([[0.0]])}
    pulled = mf.proximal(loss, 3.0)
    x = torch.tensor([1.0, 1.0])
    # 6 + 3/2 (1 + 4 + 9).
    assert pulled(fast, slow, x) == 27.0
    assert mf.proximal(loss, 0.0)(fast, slow, x) == 6.0
    grads = torch.func.grad(pulled)(fast, slow, x)
    assert grads["w"].tolist() == [4.0, 7.0]
    by_slow = torch.func.grad(pulled, argnums=1)(fast, slow, x)
    assert by_slow["v"].tolist() == [[9.0]]
    assert not by_slow["other"].any()


def test_proximal_of_nothing_adds_nothing():
    assert mf.proximal(lambda f, s, x: x.sum(), 3.0)({}, {}, torch.ones(2)) == 2.0


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_proximal_refuses(strength):
    with pytest.raises(ValueError, match=f"strength must be >= 0, got {strength}"):
        mf.proximal(loss, strength)


def test_proximal_names_the_weight_without_counterpart():
    with pytest.raises(
        mf.errors.ProblemError, match=r"slow has no 'w'. Return those names from init"
    ):
        mf.proximal(loss, 1.0)({"w": torch.ones(1)}, {"v": torch.ones(1)}, torch.ones(1))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.ones(1)], "here must be a dict of tensors .*, got list"),
        (None, "got NoneType"),
        (torch.nn.Linear(1, 1), r"got Linear.*mf.trainable\(module\)"),
        ({"w": 3.0}, "here holds 'w' of type float; things are tensors"),
        ({"w": torch.tensor(1)}, "here holds 'w' of dtype torch.int64; only floating-point"),
        ({"w": torch.tensor(True)}, "dtype torch.bool.*put them into the episode"),
    ],
)
def test_check_params_refuses(params, message):
    with pytest.raises(mf.errors.ProblemError, match=message):
        check_params(params, "here", "things")


def test_check_params_accepts_what_it_should():
    check_params({}, "here", "things")
    check_params(dict(torch.nn.Linear(1, 1).named_parameters()), "here", "things")
    check_params({"w": torch.ones(1, dtype=torch.bfloat16)}, "here", "things")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_step_and_task(bad):
    check_finite(torch.zeros(0))
    check_finite(torch.zeros(3, 0))
    check_finite(torch.ones(3))
    losses = torch.ones(5)
    losses[3] = bad
    with pytest.raises(
        mf.errors.NonFiniteError,
        match=rf"inner_loss is {bad} before inner step 3\. Lower the solver's lr",
    ):
        check_finite(losses)
    tasks = torch.ones(4, 5)
    tasks[2, 1] = bad
    tasks[3, 0] = bad
    with pytest.raises(mf.errors.NonFiniteError, match=rf"is {bad} before inner task 2, step 1"):
        check_finite(tasks)


def test_start_is_checked_and_prepared_is_an_episode():
    problem = mf.Problem(loss, loss, lambda slow, support: [1])
    with pytest.raises(mf.errors.ProblemError, match="init must be a dict of tensors"):
        problem.start({}, None)
    same = mf.Problem(loss, loss)
    assert same.prepared({}, mf.Episode(1, 2)) == mf.Episode(1, 2)
    plain = mf.Problem(loss, loss, prepare=lambda slow, e: (e.query, e.support))
    assert plain.prepared({}, mf.Episode(1, 2)) == mf.Episode(2, 1)
    assert isinstance(plain.prepared({}, mf.Episode(1, 2)), mf.Episode)


def test_every_error_is_a_value_error():
    for name in mf.__all__:
        thing = getattr(mf, name)
        if isinstance(thing, type) and name.endswith("Error"):
            assert issubclass(thing, mf.errors.MetafocusError) and issubclass(thing, ValueError)
    assert issubclass(mf.errors.NotStationaryWarning, UserWarning)
