"""compare over axes and seeds: every number against the comparison at one point."""

from __future__ import annotations

import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor

import comparing
import pytest
import torch
from comparing import PROBLEM, RATE, STEPS, episode, outer, tasks
from hashed import Loss
from sweeping import pool

import metafocus as mf
from metafocus.comparison.agreement import agreement, bias_and_spread
from metafocus.comparison.averages import T_95, interval
from metafocus.comparison.verdicts import ADVICE, advice

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = {"first-order": mf.FirstOrder(), "last": mf.Unrolled(last=1), "full": mf.Unrolled()}


def run(over=None, *, at=None, data=None, steps=2, estimators=ESTIMATORS, **kwargs):
    return mf.compare(
        PROBLEM,
        outer() if at is None else at,
        episode() if data is None else data,
        solver=mf.SGD(RATE, steps=steps),
        estimators=estimators,
        **{"reference": "full", "repeats": 1, **kwargs},
        over=over,
    )


def plain(row):
    """The numbers of a row that do not depend on the clock."""
    keys = ("name", "relative_error", "cosine", "norm_ratio", "peak_bytes", "verdict")
    return {key: row[key] for key in keys}


@pytest.mark.parametrize("axis", ["steps", "solver.steps"])
def test_each_value_is_the_comparison_at_one_point(axis):
    found = run({axis: STEPS})
    assert found.over == {axis: STEPS}
    assert [row[axis] for row in found.rows] == [s for s in STEPS for _ in ESTIMATORS]
    for steps in STEPS:
        alone = run(steps=steps)
        assert [plain(r) for r in found.rows if r[axis] == steps] == [plain(r) for r in alone.rows]


def test_fields_of_estimators():
    solves = {"cg": mf.Implicit(mf.CG(1)), "gmres": mf.Implicit(mf.GMRES(1)), "full": mf.Unrolled()}
    found = run({"estimator.solve.steps": [1, 4]}, estimators=solves, steps=150)
    errors = {(r["name"], r["estimator.solve.steps"]): r["relative_error"] for r in found.rows}
    # Four unknowns: four steps of a Krylov method are exact, one is not.
    for name in ("cg", "gmres"):
        assert errors[name, 4] < 1e-2 * errors[name, 1]
    assert errors["full", 1] == errors["full", 4] == 0
    # By name: the reference and the others stay as they are.
    found = run({"last.last": [1, 2]})
    errors = {(r["name"], r["last.last"]): r["relative_error"] for r in found.rows}
    assert errors["last", 1] > 0 and errors["last", 2] == 0
    assert errors["first-order", 1] == errors["first-order", 2] > 0


def test_a_named_reference_does_not_change_with_the_axis():
    found = run({"estimator.last": [1, 2]})
    errors = {(r["name"], r["estimator.last"]): r["relative_error"] for r in found.rows}
    # `full` as a contender is cut off as well; as the reference it is not.
    assert errors["full", 1] == errors["last", 1] > 0 and errors["full", 2] == 0


def test_a_grid_and_values_that_are_objects(tmp_path):
    over = {"solver.clip": [None, mf.clip_global(0.1)], "solver.steps": [1, 2]}
    found = run(over)
    places = [(row["solver.clip"], row["solver.steps"]) for row in found.rows]
    assert len(set(places)) == 4 and places[0] == ("None", 1) and "clip_global" in places[-1][0]
    found.plot(tmp_path / "grid.png")
    found.to_json(tmp_path / "grid.json")
    assert json.loads((tmp_path / "grid.json").read_text())["over"]["solver.steps"] == [1, 2]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"solver.zigzag": [1]}, "nothing has the field 'solver.zigzag'. Use tasks, or one of"),
        ({"full.solve": [1]}, "nothing has the field 'full.solve'"),
        ({"steps": []}, "over must be a dict of lists"),
        ({"steps": 3}, "over must be a dict of lists"),
        ([1, 2], "over must be a dict of lists"),
        ({"steps": [1, 1]}, "'steps' has 1 twice"),
        ({"tasks": [0]}, "tasks must be an integer >= 1"),
    ],
)
def test_bad_axes(over, message):
    with pytest.raises(mf.errors.ProblemError, match=message):
        run(over)


def test_a_contender_that_does_not_follow_the_axis_is_refused():
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.Unrolled())
    with pytest.raises(mf.errors.ProblemError, match="over changes steps, which others"):
        run({"steps": STEPS}, others={"meta": meta})


# --- seeds -----------------------------------------------------------------------------------


def test_means_and_intervals_over_problems():
    found = run({"steps": [2]}, at=outer, data=episode, seeds=4)
    alone = [run(at=outer(seed), data=episode(seed)) for seed in range(4)]
    for i, row in enumerate(found.rows):
        for key in ("relative_error", "cosine", "norm_ratio"):
            values = [result.rows[i][key] for result in alone]
            mean, reach = statistics.fmean(values), T_95[2] * statistics.stdev(values) / 2
            assert row[key] == pytest.approx(mean, rel=1e-12, abs=1e-15)
            low, top = (-1.0, 1.0) if key == "cosine" else (0.0, math.inf)
            assert row[f"{key}_high"] == pytest.approx(min(mean + reach, top), abs=1e-14)
            assert row[f"{key}_low"] == pytest.approx(max(mean - reach, low), abs=1e-14)
        assert row["seeds"] == 4 and row["diverged"] == 0
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
    # Each problem has an answer of its own; that is no noise of the estimator.
    assert {row["spread"] for row in found.rows} == {0.0}
    assert "noisy" not in {row["verdict"] for row in found.rows}


def test_noise_is_told_from_differences_between_problems():
    found = run(at=outer, data=episode, seeds=3, others={"evolution": comparing.evolution})
    verdicts = {row["name"]: row["verdict"] for row in found.rows}
    assert verdicts["evolution"] == "noisy" and verdicts["full"] == "exact"


def test_generators_are_seeded_anew_for_each_seed():
    generator = torch.Generator().manual_seed(3)
    value = mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.FirstOrder())
    others = {"es": mf.algorithms.Evolution(value, sigma=1e-3, pairs=4, generator=generator)}
    before = generator.get_state()
    few, many = (run(others=others, seeds=n).rows[-1] for n in (2, 3))
    assert torch.equal(generator.get_state(), before)
    assert few["spread"] > 0
    # The mean of three is not that of two: the third draw is another one.
    assert few["relative_error"] != many["relative_error"]
    assert run(others=others, seeds=2).rows[-1]["relative_error"] == few["relative_error"]


def diverging(*seeds):
    return lambda seed: {"w": outer(seed)["w"] * (1e200 if seed in seeds else 1.0)}


def test_a_seed_that_diverges_is_counted():
    # The reference is given, so that one seed has no hypergradient and the others do.
    found = run(at=diverging(1), seeds=3, reference={"w": torch.ones(4)})
    row = found.rows[-1]
    assert row["diverged"] == 1 and row["verdict"] == "diverged"
    assert row["relative_error_low"] <= row["relative_error"] <= row["relative_error_high"]
    assert "(2 of 3 seeds)" in found.table() and "(2 of 3 seeds)" in found.to_latex()


def test_one_finite_seed_has_no_interval(tmp_path):
    over = {"steps": [1, 2]}
    found = run(over, at=diverging(1, 2), seeds=3, reference={"w": torch.ones(4)})
    for row in found.rows:
        assert row["relative_error"] is not None and row["diverged"] == 2
        for key in ("relative_error", "cosine", "norm_ratio", "seconds"):
            assert row[f"{key}_low"] is None and row[f"{key}_high"] is None
    assert "±" not in found.table() and "(1 of 3 seeds)" in found.table()
    assert "[" not in found.to_latex()
    found.plot(tmp_path / "curves.png")
    found.pareto(tmp_path / "pareto.png")


def test_intervals():
    assert interval([2.0]) == interval([]) == (None, None)
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Mean 3, standard error sqrt(1/2), t of four degrees of freedom 2.776.
    assert (low, high) == pytest.approx((3 - 2.776 / 2**0.5, 3 + 2.776 / 2**0.5))
    many = [float(i % 2) for i in range(1000)]
    low, high = interval(many)
    # Nearly normal: 1.96 standard errors of a half each way.
    assert low is not None and high is not None
    assert high - 0.5 == pytest.approx(1.962 * statistics.stdev(many) / 1000**0.5, rel=1e-3)


def test_sketches_keep_norms_of_means():
    """Above 256 entries a draw is kept as 256 numbers, from which the bias is estimated."""
    torch.manual_seed(0)
    exact = {"a": torch.randn(3000), "b": torch.randn(40, 50)}
    shift = {k: 0.3 * torch.randn_like(v) for k, v in exact.items()}
    draws = [{k: v + shift[k] + torch.randn_like(v) for k, v in exact.items()} for _ in range(50)]
    found = [agreement(draw, exact) for draw in draws]
    assert all(len(a.sketch) == 256 for a in found)
    bias, spread = bias_and_spread(found) or (0.0, 0.0)
    size = math.sqrt(sum(float((v**2).sum()) for v in exact.values()))
    mean = {k: sum(d[k] for d in draws) / 50 - v for k, v in exact.items()}
    # Relative standard deviation of a sketched norm: sqrt(1 / 512); four of them.
    by_hand = math.sqrt(sum(float((v**2).sum()) for v in mean.values())) / size
    assert bias == pytest.approx(by_hand, rel=4 / math.sqrt(512))
    assert spread == pytest.approx(math.sqrt(5000) / size, rel=0.02)


# --- references ------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["central differences", comparing.exact])
def test_references(reference):
    found = run({"steps": STEPS}, reference=reference)
    named = run({"steps": STEPS})
    for a, b in zip(found.rows, named.rows, strict=True):
        # The error of central differences in float64: eps^(2/3), a few e-11.
        assert a["relative_error"] == pytest.approx(b["relative_error"], rel=1e-6, abs=1e-8)
    assert {r["verdict"] for r in found.rows if r["name"] == "full"} == {"exact"}
    assert found.reference == getattr(reference, "__name__", reference)


def test_a_hypergradient_function_is_a_reference():
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.Unrolled())
    assert run(reference=mf.hypergrad(meta)).rows[-1]["relative_error"] == 0
    with pytest.raises(mf.errors.ProblemError, match="reference function must return a dict"):
        run(reference=lambda outer, episode: outer["w"])


def test_central_differences_of_many_parameters_are_refused():
    with pytest.raises(mf.errors.ProblemError, match="six inner loops for each of the 10,001"):
        run(at={"w": torch.zeros(10_001)}, reference="central differences")


# --- tasks and other contenders --------------------------------------------------------------


def test_tasks():
    found = run({"tasks": [1, 5]}, data=tasks())
    meta = mf.over_tasks(mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.FirstOrder()))
    exact = mf.over_tasks(mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.Unrolled()))
    mine, truth = (mf.hypergrad(m)(outer(), tasks())[0]["w"] for m in (meta, exact))
    error = float((mine - truth).norm() / truth.norm())
    (row,) = (r for r in found.rows if r["tasks"] == 5 and r["name"] == "first-order")
    assert row["relative_error"] == pytest.approx(error, rel=1e-12)
    with pytest.raises(mf.errors.ProblemError, match="6 tasks, and the episode holds 5"):
        run({"tasks": [6]}, data=tasks())


@pytest.mark.parametrize(
    "algorithm",
    [
        mf.algorithms.SOBA(PROBLEM, inner_lr=RATE, v_lr=RATE),
        mf.algorithms.AmIGO(PROBLEM, inner_lr=RATE, v_lr=RATE, inner_steps=2, v_steps=3),
        mf.algorithms.F2SA(PROBLEM, inner_lr=RATE, strength=5.0),
        mf.algorithms.BOME(PROBLEM, inner_lr=RATE, fast_lr=RATE, inner_steps=2),
    ],
)
def test_single_loop_algorithms_over_tasks(algorithm):
    """The mean over tasks of what each says alone, in the order in which tasks are drawn."""
    exact = mf.over_tasks(mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.Unrolled()))
    truth = mf.hypergrad(exact)(outer(), tasks())[0]["w"]
    found = []
    for i in range(5):
        state, grads = algorithm.init(outer(), episode(i).support), {}
        for _ in range(2):
            grads, state, _ = algorithm.step(outer(), state, episode(i))
        found.append(grads["w"])
    error = float((torch.stack(found).mean(0) - truth).norm() / truth.norm())
    rows = run({"tasks": [5]}, data=tasks(), others={"single": algorithm}).rows
    assert rows[-1]["relative_error"] == pytest.approx(error, rel=1e-9)


def test_compiled_forms_over_tasks():
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.Unrolled())
    others = {
        "hypergrad": mf.hypergrad(meta),
        "compiled": mf.compiled(hypergradient=mf.hypergrad(meta), backend="eager"),
    }
    found = run({"tasks": [1, 5]}, data=tasks(), others=others)
    assert [r["verdict"] for r in found.rows if r["name"] in others] == ["exact"] * 4
    own = mf.compiled(lambda outer, episode: mf.hypergrad(meta)(outer, episode), backend="eager")
    with pytest.raises(mf.errors.ProblemError, match="'own' compiles a function of its own"):
        run({"tasks": [2]}, data=tasks(), others={"own": own})


def test_single_loop_algorithms():
    # After 150 steps of rate 0.1 at curvatures from 0.5 on, both unknowns of SOBA are at rest:
    # 0.95^150 is 5e-4. It is then the hypergradient of the whole inner loop.
    (row,) = run(
        others={"soba": comparing.soba}, estimators={}, reference=mf.Implicit(mf.Dense()), steps=150
    ).rows
    assert row["relative_error"] < 1e-2 and row["verdict"] == "close"


def test_compiled_forms():
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(RATE, 2), estimator=mf.Unrolled())
    compiled = mf.compiled(mf.hypergrad(meta), backend="eager")
    row = run(others={"compiled": compiled}).rows[-1]
    assert row["verdict"] == "exact" and row["peak_bytes"] is None


def test_contenders_that_are_nothing():
    with pytest.raises(mf.errors.ProblemError, match="'odd' must be a meta loss"):
        run(others={"odd": lambda solver: 3})
    with pytest.raises(mf.errors.ProblemError, match="'odd' must be a meta loss"):
        run(others={"odd": 3})


# --- cells -----------------------------------------------------------------------------------


def test_a_comparison_is_extended(tmp_path, monkeypatch):
    options = {"at": outer, "data": episode, "folder": tmp_path}
    first = run({"steps": [1, 2]}, seeds=2, **options)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(kept) == 2 * 2 * 3
    more = {**ESTIMATORS, "recompute": mf.Unrolled(recompute=True)}
    second = run({"steps": [1, 2, 4]}, seeds=3, estimators=more, **options)
    assert len(list(tmp_path.glob("*.json"))) == 3 * 3 * 4
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    direct = run({"steps": [1, 2, 4]}, seeds=3, estimators=more, at=outer, data=episode)
    assert [plain(r) for r in second.rows] == [plain(r) for r in direct.rows]
    assert [plain(r) for r in run({"steps": [1, 2]}, seeds=2, **options).rows] == [
        plain(r) for r in first.rows
    ]


def test_another_problem_is_another_cell(tmp_path):
    run(folder=tmp_path)
    count = len(list(tmp_path.glob("*.json")))
    run(folder=tmp_path, at={"w": outer()["w"] + 1e-9})
    run(folder=tmp_path, data=episode(1))
    run(folder=tmp_path, reference="last")
    assert len(list(tmp_path.glob("*.json"))) == 4 * count


def test_a_class_that_changes_is_another_cell(tmp_path, monkeypatch):
    """The object is the same, the code of its class is not: a kept result would be of the old."""
    loss = Loss(1.0)
    problem = mf.Problem(loss, loss)

    def error():
        return mf.compare(
            problem,
            outer(),
            episode(),
            solver=mf.SGD(RATE, steps=2),
            estimators={"first-order": mf.FirstOrder()},
            reference=mf.Unrolled(),
            repeats=1,
            folder=tmp_path,
        ).rows[0]["relative_error"]

    before = error()
    assert error() == before and len(list(tmp_path.glob("*.json"))) == 1
    monkeypatch.setattr(Loss, "__call__", lambda self, fast, slow, x: (fast["w"] ** 4 * x).sum())
    assert error() != before
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_cells_of_equal_content_run_once(tmp_path):
    # First order has no such field: it is one cell for both values.
    run({"estimator.last": [1, 2]}, folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1 + 2


def test_a_cell_that_fails_says_so_and_is_tried_again(tmp_path, capsys):
    def broken(inner_loss, solver, start, outer, support):
        raise ArithmeticError("no way")

    with pytest.raises(mf.errors.ProblemError, match=r"(?s)1 of 4 cells failed.*no way"):
        run(folder=tmp_path, estimators={**ESTIMATORS, "broken": broken})
    assert len(run(folder=tmp_path).rows) == 3
    capsys.readouterr()


def test_an_array_is_a_list_of_values():
    found = run({"solver.lr": torch.tensor([0.25, 0.5])})
    assert found.over == {"solver.lr": [0.25, 0.5]}
    assert [plain(r) for r in found.rows] == [
        plain(r) for r in run({"solver.lr": [0.25, 0.5]}).rows
    ]


def test_threads_give_the_same():
    """Four threads want the same references at once."""
    over = {"steps": [1, 2, 3]}
    with ThreadPoolExecutor(4) as executor:
        there = run(over, executor=executor)
    assert [plain(r) for r in there.rows] == [plain(r) for r in run(over).rows]


def test_a_number_is_no_executor():
    with pytest.raises(mf.errors.ProblemError, match=r"executor must have submit.*got 4"):
        run(executor=4)


@pytest.mark.slow
def test_an_executor_gives_the_same(tmp_path):
    others = {"soba": comparing.soba, "evolution": comparing.evolution}
    options = {"at": outer, "data": episode, "seeds": 2, "others": others}
    with pool() as executor:
        there = run({"steps": [1, 2]}, executor=executor, **options)
    here = run({"steps": [1, 2]}, **options)
    assert [plain(r) for r in there.rows] == [plain(r) for r in here.rows]


# --- what is shown ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures(tmp_path, suffix):
    found = run({"steps": STEPS}, at=outer, data=episode, seeds=3)
    found.plot(tmp_path / f"curves.{suffix}")
    found.pareto(tmp_path / f"pareto.{suffix}")
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    for name in ("curves", "pareto"):
        assert (tmp_path / f"{name}.{suffix}").read_bytes().startswith(begin)


def test_labels_of_points_do_not_overlap():
    from matplotlib.figure import Figure

    from metafocus.comparison.labels import label_points

    figure = Figure(figsize=(6, 4))
    panel = figure.subplots()
    points = [(1 + 1e-3 * i, 1.0, f"estimator {i}") for i in range(8)]
    panel.scatter([p[0] for p in points], [p[1] for p in points])
    panel.set(xlim=(0, 2), ylim=(0, 2))
    figure.draw_without_rendering()
    label_points(panel, points)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in panel.texts if t.get_text()]
    assert len(boxes) == 8
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


def test_table_and_latex():
    found = run({"steps": STEPS}, at=outer, data=episode, seeds=3)
    table = found.table()
    assert str(found) == table
    assert "±" in table and "over steps, 3 seeds" in table
    for name in {row["verdict"] for row in found.rows} - {"exact"}:
        assert advice(name) in table
    text = found.to_latex()
    assert text.startswith("\\begin{tabular}{llrrrrrl}\n\\toprule\nsteps & estimator & error")
    assert text.count(r"\addlinespace") == 2 and text.count("first-order") == 3
    strange = mf.Comparison([{**found.rows[0], "name": "a_b & 5%\\", "steps": 1}], "x")
    assert r"a\_b \& 5\%\textbackslash{}" in strange.to_latex()


def test_every_verdict_has_a_paragraph():
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "comparing.md").read_text()
    headings = {line[4:].lower() for line in page.splitlines() if line.startswith("### ")}
    assert headings == {name.replace(",", "") for name in ADVICE}
