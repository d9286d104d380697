"""Central differences as a reference: a step that fits the numbers, or a refusal."""

from __future__ import annotations

import math

import pytest
import torch

import metafocus as mf
from metafocus.comparison.differences import differences

pytestmark = pytest.mark.usefixtures("float64")


def of(function, at):
    """Central differences of a function of a tensor, as the outer loss of no inner step."""
    outer = {"x": torch.as_tensor(at)}
    found = differences(_meta(function), outer, mf.Episode(None, None))
    assert found.error is not None
    return found.grads["x"], found.error


def _meta(function):
    def outer_loss(fast, slow, data):
        value = function(slow["x"])
        # In the type of the function, which an addition would widen.
        return value + (0 * fast["w"].sum()).to(value.dtype)

    problem = mf.Problem(
        lambda fast, slow, data: ((fast["w"] - slow["x"].sum()) ** 2).sum(),
        outer_loss,
        lambda slow, support: {"w": torch.zeros(1)},
    )
    return mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=mf.FirstOrder())


def relative(found, exact):
    exact = torch.as_tensor(exact)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "function", "at", "slope"),
    [
        ("scale one", torch.sin, 0.3, math.cos(0.3)),
        ("small, and undefined below zero", torch.log, 1e-8, 1e8),
        ("large, and much faster than its size", torch.sin, 1e6, math.cos(1e6)),
        ("large", lambda x: x**2, 1e6, 2e6),
        ("a small factor", lambda x: 1e-12 * torch.sin(x), 0.3, 1e-12 * math.cos(0.3)),
    ],
)
def test_the_step_fits_the_scale(name, function, at, slope):
    found, error = of(function, at)
    # Half of the digits are asked for; near the edge of its domain log has a few less.
    assert relative(found, slope) < 1e-6, name
    assert relative(found, slope) <= error, name


def test_tensors_of_two_scales_have_steps_of_their_own():
    outer = {"a": torch.tensor([1e-8, 2e-8]), "b": torch.tensor([1e6])}
    problem = mf.Problem(
        lambda fast, slow, data: (fast["w"] ** 2).sum(),
        lambda fast, slow, data: (
            1e-8 * torch.log(slow["a"]).sum() + torch.sin(slow["b"]).sum() + 0 * fast["w"].sum()
        ),
        lambda slow, support: {"w": torch.zeros(1)},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=mf.FirstOrder())
    grads, error = differences(meta, outer, mf.Episode(None, None))
    assert error is not None
    exact = {"a": 1e-8 / outer["a"], "b": torch.cos(outer["b"])}
    for k in outer:
        assert float((grads[k] - exact[k]).norm() / exact[k].norm()) < 1e-5
    # The rounding of numbers as large as 1e6 is suspected of more than it did.
    assert error < 1e-4


@pytest.mark.parametrize("inside", ["the loss", "a part of it"])
def test_a_loss_in_a_narrower_type_takes_a_larger_step(inside):
    """The step of float64 would have an error of 1e-7 / 6e-6, two per cent."""

    def function(x):
        value = torch.sin(x.float())
        return value if inside == "the loss" else value.double()

    found, error = of(function, 0.3)
    # The balance of float32: eps^(2/3) is 2e-5.
    assert relative(found, math.cos(0.3)) < 5e-4
    assert relative(found, math.cos(0.3)) <= error < 1e-2


def test_the_error_is_as_large_as_it_says():
    """For 50 functions of one or four numbers, computed in float32 inside: their exact slope."""
    refused = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        n = 1 if seed % 2 else 4
        a, b, x = (torch.randn(s, generator=generator) for s in ((5, n), (5,), (n,)))
        exact = (1 - torch.tanh(a @ x + b) ** 2) @ a

        def function(x, a=a, b=b):
            return torch.tanh(a.float() @ x.float() + b.float()).double().sum()

        try:
            found, error = of(function, x)
        except mf.errors.ProblemError:
            refused += 1
            continue
        # An estimate from neighbouring steps, no bound: a factor of two.
        assert relative(found, exact) <= 2 * error < 2e-2
    # A slope that is small by chance has too few digits.
    assert refused <= 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(mf.errors.ProblemError, match=f"float32 or float64, and .* are {dtype}"):
        of(lambda x: torch.sin(x).to(dtype), 0.3)


def test_hidden_half_precision_is_refused():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, generator=generator) for _ in range(2))
    with pytest.raises(mf.errors.ProblemError, match=r"neighbouring steps disagree by .*'x'"):
        of(lambda x: torch.sin((a * x + b).bfloat16().float()).sum(), torch.tensor(0.3).float())


def test_a_rounded_loss_is_no_zero():
    with pytest.raises(mf.errors.ProblemError, match=r"no step up to .* changes the loss"):
        of(lambda x: torch.round(100 * x) / 100, 0.3012)


def test_a_true_zero_is_one():
    assert of(lambda x: 0 * x + 2.0, 0.3) == (torch.tensor(0.0), 0.0)


def test_complex_parameters_are_refused():
    with pytest.raises(mf.errors.ProblemError, match="moves real numbers, and outer"):
        differences(
            _meta(lambda x: x.abs().sum()),
            {"x": torch.ones(2, dtype=torch.complex128)},
            mf.Episode(None, None),
        )


def test_a_comparison_says_how_well_they_are_known(tmp_path):
    def loss(fast, slow, x):
        return ((fast["w"] - torch.sin(slow["c"].float()).double() * x) ** 2).sum()

    problem = mf.Problem(loss, loss, lambda slow, support: {"w": torch.zeros(2)})

    def compared(reference, folder=None):
        return mf.compare(
            problem,
            {"c": torch.tensor(0.7)},
            mf.Episode(torch.ones(2), torch.full((2,), 2.0)),
            solver=mf.SGD(0.1, steps=2),
            estimators={"full": mf.Unrolled()},
            reference=reference,
            repeats=1,
            folder=folder,
        )

    found = compared("central differences")
    (row,) = found.rows
    assert 1e-9 < row["relative_error"] <= row["reference_error"] < 1e-2
    assert f"known to a relative error of {row['reference_error']:.1e}" in found.table()
    assert "reference_error" not in compared("full").rows[0]
    # The error is kept with the reference: a second contender does not compute it again.
    for _ in range(2):
        (again,) = compared("central differences", tmp_path).rows
        assert again["reference_error"] == row["reference_error"]
    for cell in tmp_path.glob("*.json"):
        cell.unlink()
    (again,) = compared("central differences", tmp_path).rows
    assert again["reference_error"] == row["reference_error"]
