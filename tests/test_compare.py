"""compare: every number of a row against one computed by hand on a quadratic."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import metafocus as mf
from metafocus.comparison import observe as examine
from metafocus.comparison.report import COLUMNS

pytestmark = pytest.mark.usefixtures("float64")

KEYS = {
    "name",
    "relative_error",
    "cosine",
    "norm_ratio",
    "seconds",
    "peak_bytes",
    "gradient_evaluations",
    "hvp_evaluations",
    "inner_residual",
    "linear_residual",
    "verdict",
}

H = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
P = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
T = torch.tensor([0.3, 0.4, -1.0], dtype=torch.float64)
C = torch.tensor([0.2, -0.1, 0.7], dtype=torch.float64)
LR = 0.1


def inner_loss(fast, slow, support):
    return 0.5 * (support * (fast["x"] - slow["p"]) ** 2).sum()


def outer_loss(fast, slow, query):
    return 0.5 * ((fast["x"] - query) ** 2).sum() + (C * slow["p"]).sum()


def quadratic() -> mf.Problem:
    """`x_K = (1 - r^K) p` with `r = 1 - lr h`, from the start 0, and `x* = p`."""
    return mf.Problem(inner_loss, outer_loss, init=lambda slow, support: {"x": torch.zeros(3)})


def after(steps: int) -> tuple[Tensor, Tensor]:
    """Return `1 - r^K` and the derivative `v` of the outer loss by the fast weights."""
    gone = 1 - (1 - LR * H) ** steps
    return gone, gone * P - T


def run(estimators, reference, *, steps=4, lr=LR, repeats=1, problem=None, **kwargs):
    return mf.compare(
        problem or quadratic(),
        {"p": P},
        mf.Episode(H, T),
        solver=mf.SGD(lr, steps=steps),
        estimators=estimators,
        reference=reference,
        repeats=repeats,
        **kwargs,
    )


def row_of(result: mf.Comparison, name: str) -> dict:
    return next(row for row in result.rows if row["name"] == name)


EXACT = C + P - T
"""The hypergradient at the minimum: `direct + (d x* / d p)' (x* - t)`."""


def expected(name: str, steps: int) -> Tensor:
    gone, v = after(steps)
    if name == "first-order":
        return C
    if name == "last-1":
        return C + LR * H * v
    if name == "unrolled":
        return C + gone * v
    if name == "dense":
        return C + v
    assert name == "cg-1"
    return C + H * (v @ v) / (v @ (H * v)) * v


ESTIMATORS = {
    "first-order": mf.FirstOrder(),
    "last-1": mf.Unrolled(last=1),
    "unrolled": mf.Unrolled(),
    "dense": mf.Implicit(mf.Dense()),
    "cg-1": mf.Implicit(mf.CG(1)),
}


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_error_cosine_and_norm_ratio(steps):
    result = run(ESTIMATORS, {"p": EXACT}, steps=steps)
    for row in result.rows:
        found = expected(row["name"], steps)
        error = math.dist(found, EXACT) / math.hypot(*EXACT)
        ratio = math.hypot(*found) / math.hypot(*EXACT)
        cosine = float(found @ EXACT) / (math.hypot(*found) * math.hypot(*EXACT))
        assert row["relative_error"] == pytest.approx(error, rel=1e-10, abs=1e-13), row["name"]
        assert row["norm_ratio"] == pytest.approx(ratio, rel=1e-12), row["name"]
        assert row["cosine"] == pytest.approx(cosine, rel=1e-12), row["name"]


def test_rows_have_the_documented_keys_in_the_given_order():
    result = run(ESTIMATORS, {"p": EXACT})
    assert [row["name"] for row in result.rows] == list(ESTIMATORS)
    for row in result.rows:
        assert set(row) == KEYS
        assert tuple(row) == COLUMNS


STEPS = 5


@pytest.mark.parametrize(
    ("estimator", "gradients", "products"),
    [
        (mf.FirstOrder(), STEPS, 0),
        (mf.Unrolled(last=2), STEPS, 2),
        (mf.Unrolled(last=9), STEPS, STEPS),
        (mf.Unrolled(), STEPS, STEPS),
        (mf.Unrolled(recompute=True), 2 * STEPS, STEPS),
        # Segments of one and of two steps are rebuilt; the last keeps its graph.
        (mf.Unrolled(recompute=2), STEPS + 3, STEPS),
        (mf.Unrolled(last=2, recompute=True), STEPS + 2, 2),
        # A gradient and one forward-mode product, or two displaced gradients, for each step back.
        (mf.Unrolled(hvp=mf.hvp_forward), 3 * STEPS, STEPS),
        # Central differences ask for first derivatives only.
        (mf.Unrolled(hvp=mf.hvp_finite(1e-4)), 4 * STEPS, 0),
        # Implicit linearises once, and compares this gradient with the one at the start.
        (mf.Implicit(mf.CG(1)), STEPS + 2, 2),
        (mf.Implicit(mf.CG(7)), STEPS + 2, 8),
        (mf.Implicit(mf.Neumann(3, scale=LR)), STEPS + 2, 3),
    ],
    ids=str,
)
def test_counts(estimator, gradients, products):
    (row,) = run({"it": estimator}, {"p": EXACT}, steps=STEPS).rows
    assert (row["gradient_evaluations"], row["hvp_evaluations"]) == (gradients, products)


def test_counts_are_those_of_one_call_whatever_the_repeats():
    few, many = (run(ESTIMATORS, "unrolled", repeats=r).rows for r in (1, 4))
    for a, b in zip(few, many, strict=True):
        assert a["gradient_evaluations"] == b["gradient_evaluations"]
        assert a["hvp_evaluations"] == b["hvp_evaluations"]


def test_a_plain_function_is_an_estimator():
    def first_order(inner_loss, solver, start, outer, support):
        return mf.FirstOrder()(inner_loss, solver, start, outer, support)

    (row,) = run({"mine": first_order}, mf.FirstOrder()).rows
    assert row["verdict"] == "exact"
    assert row["gradient_evaluations"] == 4
    assert row["hvp_evaluations"] == 0
    assert row["linear_residual"] is None


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_linear_residual(steps):
    result = run(ESTIMATORS, {"p": EXACT}, steps=steps)
    _, v = after(steps)
    x = (v @ v) / (v @ (H * v)) * v
    by_hand = math.dist(H * x, v) / math.hypot(*v)
    assert row_of(result, "cg-1")["linear_residual"] == pytest.approx(by_hand, rel=1e-10)
    assert row_of(result, "dense")["linear_residual"] < 1e-14
    for name in ("first-order", "last-1", "unrolled"):
        assert row_of(result, name)["linear_residual"] is None


def test_linear_residual_does_not_forgive_damping():
    (row,) = run({"damped": mf.Implicit(mf.Dense(damping=3.0))}, {"p": EXACT}).rows
    _, v = after(4)
    by_hand = math.dist(H / (H + 3) * v, v) / math.hypot(*v)
    assert row["linear_residual"] == pytest.approx(by_hand, rel=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_inner_residual(steps):
    result = run(ESTIMATORS, {"p": EXACT}, steps=steps)
    left = (1 - LR * H) ** steps
    by_hand = math.hypot(*(H * left * P)) / math.hypot(*(H * P))
    for row in result.rows:
        assert row["inner_residual"] == pytest.approx(by_hand, rel=1e-10)


# --- verdicts --------------------------------------------------------------------------------


def test_verdicts_far_from_the_minimum():
    result = run(ESTIMATORS, "unrolled", steps=3)
    assert {row["name"]: row["verdict"] for row in result.rows} == {
        "first-order": "right direction, wrong length",
        "last-1": "right direction, wrong length",
        "unrolled": "exact",
        "dense": "not stationary",
        "cg-1": "not stationary",
    }


@pytest.mark.parametrize(("left", "verdict"), [(0.0098, "close"), (0.0102, "not stationary")])
def test_stationary_means_a_hundredth_of_the_initial_gradient(left, verdict):
    # One step of 1 - left on a quadratic of curvature 1 leaves this part of the gradient.
    result = mf.compare(
        quadratic(),
        {"p": P},
        mf.Episode(torch.ones(3), T),
        solver=mf.SGD(1 - left, steps=1),
        estimators={"dense": mf.Implicit(mf.Dense())},
        reference={"p": EXACT},
        repeats=1,
    )
    (row,) = result.rows
    assert row["inner_residual"] == pytest.approx(left, rel=1e-10)
    assert row["verdict"] == verdict


def test_verdicts_at_the_minimum():
    result = run(ESTIMATORS, {"p": EXACT}, steps=400)
    assert {row["name"]: row["verdict"] for row in result.rows} == {
        "first-order": "biased",
        "last-1": "biased",
        "unrolled": "exact",
        "dense": "exact",
        "cg-1": "not converged",
    }


@pytest.mark.parametrize(
    ("size", "verdict"),
    [
        (0.5e-8, "exact"),
        (1e-7, "close"),
        (0.049, "close"),
        (0.051, "right direction, wrong length"),
    ],
)
def test_exact_means_half_of_the_digits(size, verdict):
    (row,) = run({"fo": mf.FirstOrder()}, {"p": C / (1 + size)}).rows
    assert row["relative_error"] == pytest.approx(size, rel=1e-6)
    assert row["verdict"] == verdict


@pytest.mark.parametrize(
    ("error", "verdict"), [(9.9, "right direction, wrong length"), (10.1, "diverged")]
)
def test_diverged_means_ten_times_too_long(error, verdict):
    (row,) = run({"fo": mf.FirstOrder()}, {"p": C / (1 + error)}).rows
    assert row["relative_error"] == pytest.approx(error)
    assert row["verdict"] == verdict


def test_exact_is_judged_in_the_type_of_the_outer_parameters():
    result = mf.compare(
        mf.Problem(
            inner_loss,
            lambda fast, slow, q: 0.5 * ((fast["x"] - q) ** 2).sum(),
            init=lambda slow, support: {"x": torch.zeros(3, dtype=torch.float32)},
        ),
        {"p": P.float()},
        mf.Episode(H.float(), T.float()),
        solver=mf.SGD(LR, steps=4),
        estimators={"u": mf.Unrolled()},
        reference={"p": (after(4)[0] * after(4)[1]).float() * (1 + 1e-5)},
    )
    (row,) = result.rows
    assert row["relative_error"] == pytest.approx(1e-5, rel=0.1)
    assert row["verdict"] == "exact"
    assert result.environment["dtype"] == "float32"


def test_diverged_by_nan():
    def nan_inner(fast, slow, support):
        return (fast["x"] - slow["p"]).sum() + (1e-3 - fast["x"]).log().sum()

    problem = mf.Problem(nan_inner, outer_loss, init=lambda slow, support: {"x": torch.zeros(3)})
    result = run(ESTIMATORS, {"p": EXACT}, problem=problem, lr=10.0)
    # The first step is fine, the second takes the logarithm of what is not there.
    for row in result.rows:
        assert set(row) == KEYS
        assert row["verdict"] == "diverged"
        assert row["relative_error"] is None and row["seconds"] is None
        assert math.isnan(row["inner_residual"])
    lines = [line for line in result.table().splitlines() if "│" in line]
    assert sum("diverged" in line for line in lines) == len(ESTIMATORS)


@pytest.mark.parametrize("lr", [3.0, 1e10], ids=["finite", "overflow"])
def test_diverged_by_a_huge_learning_rate(lr):
    result = run({"u": mf.Unrolled(), "fo": mf.FirstOrder()}, {"p": EXACT}, lr=lr, steps=12)
    assert row_of(result, "u")["verdict"] == "diverged"
    assert row_of(result, "fo")["verdict"] == "biased"


def test_a_gradient_that_is_not_finite_diverges(tmp_path):
    def root(fast, slow, query):
        return (fast["x"] * 0).sqrt().sum() + (slow["p"] * 0).abs().sqrt().sum()

    problem = mf.Problem(inner_loss, root, init=lambda slow, support: {"x": torch.zeros(3)})
    result = run({"u": mf.Unrolled()}, {"p": EXACT}, problem=problem)
    assert result.rows[0]["verdict"] == "diverged"
    assert result.rows[0]["relative_error"] is None
    result.plot(tmp_path / "nan.png")
    result.to_json(tmp_path / "nan.json")
    assert json.loads((tmp_path / "nan.json").read_text())["rows"][0]["relative_error"] is None


def test_a_hypergradient_of_zero():
    def nothing(fast, slow, query):
        return (fast["x"] * 0 + slow["p"] * 0).sum()

    problem = mf.Problem(inner_loss, nothing, init=lambda slow, support: {"x": torch.zeros(3)})
    (row,) = run({"u": mf.Unrolled()}, {"p": torch.zeros(3)}, problem=problem).rows
    assert (row["relative_error"], row["verdict"]) == (0.0, "exact")
    (row,) = run({"u": mf.Unrolled()}, {"p": torch.zeros(3)}).rows
    assert row["verdict"] == "diverged"


# --- references and arguments ----------------------------------------------------------------


def test_the_three_kinds_of_reference_agree():
    by_name = run(ESTIMATORS, "unrolled")
    by_estimator = run(ESTIMATORS, mf.Unrolled())
    by_value = run(ESTIMATORS, {"p": expected("unrolled", 4)})
    assert by_name.reference == "unrolled"
    assert "Unrolled(" in by_estimator.reference
    assert by_value.reference == "the given hypergradient"
    for a, b, c in zip(by_name.rows, by_estimator.rows, by_value.rows, strict=True):
        assert a["relative_error"] == b["relative_error"]
        assert a["relative_error"] == pytest.approx(c["relative_error"], abs=1e-14)
    assert row_of(by_name, "unrolled")["relative_error"] == 0.0


def test_unknown_reference():
    with pytest.raises(mf.errors.ProblemError, match=r"'exact' is not one of .*'dense'"):
        run(ESTIMATORS, "exact")


@pytest.mark.parametrize("reference", [{}, {"q": EXACT}, {"p": EXACT[:2]}])
def test_reference_that_does_not_fit(reference):
    with pytest.raises(mf.errors.ProblemError, match=r"reference hypergradient has the shapes"):
        run(ESTIMATORS, reference)


def test_reference_that_is_not_finite():
    with pytest.raises(mf.errors.ProblemError, match="not finite"):
        run(ESTIMATORS, {"p": EXACT / 0})


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_below_one(repeats):
    with pytest.raises(ValueError, match=f"repeats must be an integer >= 1, got {repeats}"):
        run(ESTIMATORS, "unrolled", repeats=repeats)


def test_outer_parameters_are_needed():
    with pytest.raises(mf.errors.ProblemError, match=r"outer=\{\} with compare"):
        mf.compare(
            quadratic(),
            {},
            mf.Episode(H, T),
            solver=mf.SGD(LR, steps=1),
            estimators=ESTIMATORS,
            reference="unrolled",
        )


def test_timings_are_interleaved_medians(monkeypatch):
    calls = []

    def named(name):
        def estimator(inner_loss, solver, start, outer, support):
            calls.append(name)
            return mf.FirstOrder()(inner_loss, solver, start, outer, support)

        return estimator

    durations = iter([1.0, 10.0, 5.0, 70.0, 2.0, 20.0])
    clock = [0.0]

    def perf_counter():
        # Called before and after each timed run.
        clock.append(clock[-1] + (next(durations) if len(clock) % 2 == 0 else 0.0))
        return clock[-1]

    monkeypatch.setattr(examine, "time", SimpleNamespace(perf_counter=perf_counter))
    result = run({"a": named("a"), "b": named("b")}, "a", repeats=3)
    assert calls[-6:] == ["a", "b"] * 3
    assert row_of(result, "a")["seconds"] == pytest.approx(2.0)
    assert row_of(result, "b")["seconds"] == pytest.approx(20.0)


def test_outer_is_left_alone():
    outer = {"p": P.clone().requires_grad_()}
    state = torch.get_rng_state()
    mf.compare(
        quadratic(),
        outer,
        mf.Episode(H, T),
        solver=mf.SGD(LR, steps=2),
        estimators=ESTIMATORS,
        reference="unrolled",
    )
    assert outer["p"].grad is None and torch.equal(outer["p"], P)
    assert torch.equal(torch.get_rng_state(), state)


def test_peak_bytes_tell_recompute_from_graph():
    def loss(fast, slow, x):
        hidden = torch.tanh(torch.outer(fast["w"], x)).sum(0)
        return (torch.tanh(hidden * slow["s"]) - 0.5).square().mean()

    x = torch.linspace(-1, 1, 2000)
    result = mf.compare(
        mf.Problem(loss, loss, init=lambda slow, support: {"w": torch.zeros(2)}),
        {"s": torch.ones(())},
        mf.Episode(x, x),
        solver=mf.SGD(0.1, steps=16),
        estimators={"graph": mf.Unrolled(), "recompute": mf.Unrolled(recompute=True)},
        reference="graph",
    )
    graph, recompute = (row["peak_bytes"] for row in result.rows)
    assert recompute * 4 < graph
    assert row_of(result, "recompute")["verdict"] == "exact"


def test_maml_with_identity_init():
    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    steps, lr = 3, 0.2
    result = mf.compare(
        mf.Problem(loss, loss),
        {"w": torch.tensor([1.0, -3.0])},
        mf.Episode(torch.tensor([0.5, 0.0]), torch.tensor([2.0, 1.0])),
        solver=mf.SGD(lr, steps=steps),
        estimators={
            "maml": mf.Unrolled(),
            "fomaml": mf.FirstOrder(),
            "last": mf.Unrolled(last=1),
            "recompute": mf.Unrolled(recompute=True),
        },
        reference="maml",
    )
    # d fast / d slow is 1 - 2 lr a step, equal in all directions: only the length is wrong.
    shrink = 1 - 2 * lr
    ratio = {"maml": 1, "fomaml": shrink**-steps, "last": shrink ** (1 - steps), "recompute": 1}
    for row in result.rows:
        assert row["norm_ratio"] == pytest.approx(ratio[row["name"]])
        assert row["cosine"] == pytest.approx(1.0)
        assert row["relative_error"] == pytest.approx(ratio[row["name"]] - 1, abs=1e-12)
        wrong = "right direction, wrong length"
        assert row["verdict"] == ("exact" if ratio[row["name"]] == 1 else wrong)


# --- table, plot, JSON -----------------------------------------------------------------------


def test_table_is_readable():
    names = {**ESTIMATORS, "a rather long name of an estimator": mf.FirstOrder()}
    result = run(names, "unrolled", steps=3)
    table = result.table()
    assert isinstance(table, str) and "\x1b" not in table
    lines = table.splitlines()
    assert "hypergradients against unrolled" in lines[0]
    assert max(map(len, lines)) <= 160
    for row in result.rows:
        (line,) = (line for line in lines if f" {row['name']} " in line and "│" in line)
        assert row["verdict"] in line
        assert f"{row['relative_error']:.1e}" in line


def test_table_does_not_print(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = run(ESTIMATORS, "unrolled").table()
    assert "\x1b" not in table
    assert capsys.readouterr() == ("", "")


def test_plot_writes_a_picture_and_leaves_the_back_end(tmp_path):
    import matplotlib

    before = dict.__getitem__(matplotlib.rcParams, "backend")
    result = run(ESTIMATORS, "unrolled")
    result.plot(tmp_path / "out.png")
    result.plot(str(tmp_path / "again.png"))
    for name in ("out.png", "again.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert dict.__getitem__(matplotlib.rcParams, "backend") is before


@pytest.mark.parametrize("lr", [1e10, 1e200])
def test_plot_of_what_diverged(tmp_path, lr):
    run(ESTIMATORS, {"p": EXACT}, lr=lr, steps=12).plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 0


def refuse(word: str):
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("lr", [LR, 1e10, 1e200])
def test_json(tmp_path, lr):
    result = run(ESTIMATORS, {"p": EXACT}, lr=lr, steps=12)
    result.to_json(tmp_path / "out.json")
    text = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    assert set(text) == {"reference", "environment", "rows", "inner_losses", "over", "setting"}
    assert text["reference"] == result.reference
    assert text["environment"]["torch"] == torch.__version__
    assert text["environment"]["dtype"] == "float64"
    assert text["environment"]["threads"] == 1
    assert [row["name"] for row in text["rows"]] == list(ESTIMATORS)
    for read, row in zip(text["rows"], result.rows, strict=True):
        assert set(read) == KEYS
        for key, value in row.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            assert read[key] == (value if finite else None)


# --- seeds, other meta-losses, processes ------------------------------------------------------


def noisy_meta_loss(scale, bias=0.0):
    """A linear loss whose derivative is EXACT plus noise of the torch seed."""

    def meta_loss(outer, episode):
        noise = scale * torch.randn_like(EXACT)
        value = (outer["p"] * (EXACT * (1 + bias) + noise)).sum()
        return value, mf.Aux({}, torch.zeros(0))

    return meta_loss


def test_seeds_show_noise_and_bias():
    result = run(
        {"exact": mf.Unrolled()},
        {"p": EXACT},
        others={"noisy": noisy_meta_loss(1.0), "biased": noisy_meta_loss(1e-3, bias=0.5)},
        seeds=40,
    )
    rows = {row["name"]: row for row in result.rows}
    assert rows["noisy"]["verdict"] == "noisy"
    assert rows["biased"]["verdict"] == "right direction, wrong length"
    # Unit noise in each entry, 40 draws: the standard deviation is known to 1 / sqrt(80) or so.
    expected = len(EXACT) ** 0.5 / float(EXACT.norm())
    assert rows["noisy"]["spread"] == pytest.approx(expected, rel=0.4)
    # Forty equal draws, and the rounding of their mean.
    assert rows["exact"]["spread"] < 1e-15
    assert rows["noisy"]["gradient_evaluations"] is None
    assert "spread" in result.table()


def test_seeds_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    run({"exact": mf.Unrolled()}, {"p": EXACT}, seeds=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_name_twice():
    with pytest.raises(
        mf.errors.ProblemError, match=r"'exact' names an estimator and one of others"
    ):
        run({"exact": mf.Unrolled()}, {"p": EXACT}, others={"exact": noisy_meta_loss(1.0)})


def test_to_pandas():
    pandas = pytest.importorskip("pandas")
    frame = run(ESTIMATORS, {"p": EXACT}).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == list(ESTIMATORS) and set(frame.columns) == KEYS


@pytest.mark.slow
def test_memory_of_a_fresh_process():
    size = 1 << 20

    def loss(fast, slow, data):
        return (torch.tanh(fast["p"] * slow["p"]).repeat(4) ** 2).sum()

    problem = mf.Problem(loss, loss)
    outer = {"p": torch.ones(size, dtype=torch.float64)}
    result = mf.compare(
        problem,
        outer,
        mf.Episode(None, None),
        solver=mf.SGD(0.1, 8),
        estimators={"graph": mf.Unrolled(), "first-order": mf.FirstOrder()},
        reference="graph",
        repeats=1,
        fresh_process=True,
    )
    graph, first = (row["peak_bytes"] for row in result.rows)
    # The graph of eight steps keeps 65 MB a step; first order needs that of one.
    assert graph > 1.2 * first > 8 * size


def test_a_fixed_point_is_judged_by_its_step():
    """The inner loss here has no minimum at the fixed point: its gradient says nothing."""

    def step(fast, slow, support):
        return {"x": 0.5 * fast["x"] + slow["p"]}

    def given(slow, support):
        return {"x": 2 * slow["p"]}

    problem = mf.Problem(
        lambda fast, slow, support: (fast["x"] * slow["p"]).sum(),
        outer_loss,
        init=lambda slow, support: {"x": torch.zeros(3)},
    )
    exact = C + 2 * (2 * P - T)
    result = mf.compare(
        problem,
        {"p": P},
        mf.Episode(None, T),
        solver=mf.Given(given),
        estimators={"fixed": mf.FixedPoint(step, mf.GMRES(3)), "one": mf.OneStep(step)},
        reference={"p": exact},
    )
    assert [row["inner_residual"] for row in result.rows] == [0.0, 0.0]
    assert row_of(result, "fixed")["verdict"] == "exact"
    # One step in place of the sum of all: 1 instead of 2 times the outer gradient.
    assert row_of(result, "one")["verdict"] == "not converged"


def test_a_hypergradient_of_zero_has_a_verdict_of_its_own():
    (row,) = run(
        {"fo": mf.FirstOrder()},
        {"p": C},
        problem=mf.Problem(
            inner_loss,
            lambda fast, slow, query: (fast["x"] ** 2).sum(),
            init=lambda slow, support: {"x": torch.zeros(3)},
        ),
    ).rows
    assert row["verdict"] == "zero"


def test_peak_memory_is_that_of_the_hypergradient():
    """Nothing of the instrument's own: no copy in float64, no flat vector."""
    size = 2**18
    problem = mf.Problem(
        lambda fast, slow, x: (fast["w"] ** 2).sum(), lambda fast, slow, x: (fast["w"] ** 2).sum()
    )
    outer = {"w": torch.ones(size, dtype=torch.float32)}
    result = mf.compare(
        problem,
        outer,
        mf.Episode(None, None),
        solver=mf.SGD(0.1, steps=1),
        estimators={"fo": mf.FirstOrder()},
        reference="fo",
    )
    # Six tensors of the size of the weights are alive at once at most; twice as many bytes would
    # be a copy in float64.
    assert result.rows[0]["peak_bytes"] <= 6 * 4 * size


def test_more_than_ten_estimators_look_different_and_zero_errors_do_not_stretch_the_axis(tmp_path):
    from matplotlib.figure import Figure

    seen = []
    original = Figure.savefig
    Figure.savefig = lambda self, *args, **kwargs: seen.append(self)
    try:
        names = {f"last-{k}": mf.Unrolled(last=k) for k in range(13)}
        run(names, "last-12", steps=12).plot(tmp_path / "x.png")
    finally:
        Figure.savefig = original
    axis = seen[0].axes[0]
    looks = {
        (tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in axis.collections
    }
    assert len(looks) == 13
    low, high = axis.get_ylim()
    assert high / low < 1e6


# --- detach() inside a loss ----------------------------------------------------------------------


def meta_weight_net():
    """Weights of examples computed from their detached losses (Shu et al., arXiv 1902.07379)."""
    x, y, xq, yq = (torch.randn(shape) for shape in ((8, 3), (8,), (8, 3), (8,)))

    def each(fast, data):
        return (data[0] @ fast["w"] - data[1]) ** 2

    def inner(fast, slow, data):
        value = each(fast, data)
        return (torch.sigmoid(slow["a"] * value.detach() + slow["b"]) * value).mean()

    problem = mf.Problem(
        inner, lambda f, s, d: each(f, d).mean(), lambda slow, support: {"w": torch.zeros(3)}
    )
    outer = {"a": torch.tensor(0.3), "b": torch.tensor(0.1)}
    return problem, outer, mf.Episode((x, y), (xq, yq))


@pytest.mark.parametrize("reference", ["graph", "differences of the value"])
def test_finite_differences_of_a_loss_that_detaches_are_not_exact(reference):
    problem, outer, episode = meta_weight_net()
    if reference != "graph":
        # After one step the tape has the derivative of the meta loss as it is evaluated.
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=mf.FirstOrder())
        reference = {}
        with torch.no_grad():
            for k in outer:
                up, down = (meta({**outer, k: outer[k] + h}, episode)[0] for h in (1e-5, -1e-5))
                reference[k] = (up - down) / 2e-5
    result = mf.compare(
        problem,
        outer,
        episode,
        solver=mf.SGD(0.1, steps=1),
        estimators={
            "graph": mf.Unrolled(),
            "recompute": mf.Unrolled(recompute=True),
            "forward": mf.Unrolled(hvp=mf.hvp_forward),
            "finite": mf.Unrolled(hvp=mf.hvp_finite()),
            "finite, smaller": mf.Unrolled(hvp=mf.hvp_finite(1e-7)),
            "DARTS": mf.Unrolled(last=1, hvp=mf.hvp_finite(0.01)),
        },
        reference=reference,
        repeats=1,
    )
    rows = {row["name"]: row for row in result.rows}
    for name in ("graph", "recompute", "forward"):
        assert rows[name]["verdict"] == "exact", name
    for name in ("finite", "finite, smaller", "DARTS"):
        assert rows[name]["verdict"] not in ("exact", "close"), name
    # No smaller step helps: it is the derivative of another function.
    off = [rows[k]["relative_error"] for k in ("finite", "finite, smaller", "DARTS")]
    assert off == pytest.approx([off[0]] * 3, rel=1e-3)
    assert off[0] > 0.1


def other_than_the_tape(name, problem):
    """Return a solver for the tape, and something that takes derivatives from other points."""
    draws = torch.Generator().manual_seed(0)
    if name == "finite":
        finite = mf.Unrolled(hvp=mf.hvp_finite())
        return mf.SGD(0.1, 1), mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=finite)
    if name == "penalty":
        # At the solution, so that the tape and a penalty estimate the same derivative.
        solver = mf.SGD(0.5, 200)
        return solver, mf.bilevel(problem, solver=solver, estimator=mf.Penalty(1e4))
    if name == "evograd":
        # The expected step of the copies is one of gradient descent with the rate sigma^2 / T.
        copies = mf.EvoGrad(0.02, copies=4000, temperature=0.02**2 / 1e-3, generator=draws)
        start = mf.bilevel(problem, solver=mf.SGD(1e-3, 0), estimator=copies)
        return mf.SGD(1e-3, 1), start
    solver = mf.SGD(0.3, 8)
    value = mf.bilevel(problem, solver=solver, estimator=mf.FirstOrder())
    return solver, mf.algorithms.Evolution(value, sigma=1e-3, pairs=4000, generator=draws)


@pytest.mark.parametrize("name", ["finite", "penalty", "evograd", "evolution"])
@pytest.mark.parametrize("detached", [False, True], ids=["constant", "detached"])
def test_compare_shows_what_sees_through_detach(name, detached):
    """With constant weights of the examples all agree with the tape; with detached ones none."""
    x, y = torch.randn(8, 3), torch.randn(8)

    def each(w):
        return (x @ w - y) ** 2

    def inner(fast, slow, data):
        value = each(fast["w"])
        seen = value.detach() if detached else each(torch.zeros(3))
        return (torch.sigmoid(slow["a"] * seen) * value).mean()

    problem = mf.Problem(
        inner,
        lambda fast, slow, data: (each(fast["w"]) * torch.linspace(0, 1, 8)).mean(),
        lambda slow, support: {"w": torch.zeros(3)},
    )
    solver, other = other_than_the_tape(name, problem)
    result = mf.compare(
        problem,
        {"a": torch.tensor(0.5)},
        mf.Episode(None, None),
        solver=solver,
        estimators={"tape": mf.Unrolled()},
        others={name: other},
        reference="tape",
        repeats=1,
    )
    row = result.rows[-1]
    # Four standard deviations of the draws; the detached weights change much more.
    assert (row["verdict"] in ("exact", "close")) != detached, row
    assert not detached or row["relative_error"] > 0.1


def test_the_inner_losses_go_on_to_the_one_after_the_last_step():
    """Quadratic: with rate r the loss is multiplied by (1 - 2 r)^2 in each step."""

    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    def curve(rate, steps):
        result = mf.compare(
            mf.Problem(loss, loss),
            {"w": torch.ones(1, dtype=torch.float64)},
            mf.Episode(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)),
            solver=mf.SGD(rate, steps=steps),
            estimators={"full": mf.Unrolled()},
            reference="full",
            repeats=1,
        )
        return result.inner_losses, result.table()

    losses, text = curve(0.25, 2)
    assert losses == [1.0, 0.25, 0.0625] and text.endswith("loss 1.0000, 0.2500, then 0.0625")
    losses, text = curve(1.5, 2)
    assert losses == [1.0, 4.0, 16.0] and "warning: the last step raised it" in text
    assert curve(0.25, 0)[0] == [1.0]
