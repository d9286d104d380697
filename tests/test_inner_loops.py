"""The inner loops of examples/inner_loops: short, run by themselves, exact against plain torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loops import constants, hypergradient, tied
from problems import Case, assert_close
from ways import ONE, WAYS, expected

import metafocus as mf

FOLDER = Path(__file__).parent.parent / "examples" / "inner_loops"
F64 = torch.float64
TASKS, STEPS = 3, 4
ESTIMATORS = {
    "FirstOrder": (mf.FirstOrder(), 0),
    "graph": (mf.Unrolled(), None),
    "last=2": (mf.Unrolled(last=2), 2),
    "recompute": (mf.Unrolled(recompute=True), None),
    "recompute=3": (mf.Unrolled(recompute=3), None),
    "forward": (mf.Unrolled(hvp=mf.hvp_forward), None),
    "finite": (mf.Unrolled(hvp=mf.hvp_finite()), None),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"inner_loops_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def randn(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tolerance(name):
    # Sums in another order; u^(2/3) of the third derivative for finite differences.
    return 1e-6 if name == "finite" else 1e-11


def by_hand(first, outer, batches, move, last=None):
    """The fast weights after each step of `move(fast, slow, data)`, on the tape.

    The steps before the last `last` are constants, tied to the start.
    """
    head = 0 if last is None else max(len(batches) - last, 0)
    fast, slow = (constants(first), constants(outer)) if head else (first, outer)
    path = []
    for t, data in enumerate(batches):
        if t == head and head:
            fast, slow = tied(fast, first), outer
        if t < head:
            fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
        fast = move(fast, slow, data)
        path.append(tied(fast, first) if t < head else fast)
    return path


def descent(loss, lr):
    """A step of plain gradient descent on `loss(fast, slow, data)`."""

    def move(fast, slow, data):
        at = {k: v.clone() for k, v in fast.items()}
        found = torch.autograd.grad(loss(at, slow, data), list(at.values()), create_graph=True)
        return {k: v - lr * g for (k, v), g in zip(fast.items(), found, strict=True)}

    return move


def check(meta, case, by_task, name):
    """Every way to differentiate against the loss of each task by hand."""
    want = [hypergradient(case.outer, lambda o, i=i: by_task(o, i)) for i in range(TASKS)]
    for way, differentiate in WAYS.items():
        assert_close(differentiate(meta, case), expected(want, way), tolerance(name))


# --- the files -----------------------------------------------------------------------------------

IDEAS = {
    "generated_start": ("embed", "prototypes", "loss", "problem", "meta"),
    "hebbian": ("Hebbian",),
    "learned_preconditioner": ("Preconditioned", "problem", "meta"),
    "minibatches": ("inner", "run"),
    "multi_step_loss": ("start", "importance", "problem", "meta"),
}
"""What each file adds to an ordinary problem."""


@pytest.mark.parametrize("name", IDEAS)
def test_the_idea_has_at_most_twelve_lines_of_code(name):
    source = (FOLDER / f"{name}.py").read_text()
    lines, counted = source.splitlines(), 0
    for node in ast.parse(source).body:
        names = [getattr(node, "name", None)]
        names += [getattr(t, "id", None) for t in getattr(node, "targets", [])]
        if set(names) & set(IDEAS[name]):
            docs = {
                n
                for sub in ast.walk(node)
                if isinstance(sub, ast.Expr) and isinstance(sub.value, ast.Constant)
                for n in range(sub.lineno, (sub.end_lineno or sub.lineno) + 1)
            }
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            counted += sum(bool(lines[n - 1].strip()) and n not in docs for n in span)
    assert 0 < counted <= 12
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(IDEAS)


@pytest.mark.slow
@pytest.mark.parametrize("name", IDEAS)
def test_each_file_runs_by_itself_and_learns(name, capsys):
    module = load(name)
    found = module.main()
    assert capsys.readouterr().out
    if name == "multi_step_loss":
        # The last iterate is what counts in the end; the first ones lose their weight.
        weights = module.importance(found)
        assert weights[0] < 0.05 and weights[-2:].sum() > 0.8
    elif name == "minibatches":
        wrong = torch.arange(80) % 4 == 0
        assert found[~wrong].median() > 0.7 and found[wrong].median() < 0.3
    else:
        assert sum(found[-10:]) < 0.5 * sum(found[:10])


# --- MAML++ --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["learned", "fixed"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_multi_step_loss(name, weights):
    module = load("multi_step_loss")
    outer = {
        "w1": randn(1, 6, seed=1),
        "b1": randn(6, seed=2),
        "w2": randn(6, 1, seed=3),
        "importance": randn(STEPS, seed=4),
    }
    data = [(randn(TASKS, 5, 1, seed=s), randn(TASKS, 5, 1, seed=s + 1)) for s in (5, 7)]
    case = Case(module.problem, outer, mf.Episode(*data))
    fixed = [0.1, 0.2, 0.3, 0.4]
    estimator, last = ESTIMATORS[name]
    path = module.importance if weights == "learned" else fixed
    solver = mf.SGD(0.05, STEPS)
    meta = mf.bilevel(module.problem, solver=solver, estimator=estimator, path=path)

    def loss(fast, slow, data):
        x, y = data
        return ((torch.tanh(x @ fast["w1"] + fast["b1"]) @ fast["w2"] - y) ** 2).mean()

    def by_task(outer, i):
        support, query = (tuple(x[i] for x in part) for part in data)
        first = {k: outer[k] for k in ("w1", "b1", "w2")}
        iterates = by_hand(first, outer, [support] * STEPS, descent(loss, 0.05), last)
        share = outer["importance"].exp() / outer["importance"].exp().sum()
        share = share if weights == "learned" else fixed
        return sum(s * loss(f, outer, query) for s, f in zip(share, iterates, strict=True))

    check(meta, case, by_task, name)


# --- a minibatch at each step --------------------------------------------------------------------


def momentum_run(outer, batches, last=None):
    """Minibatch descent with momentum 0.5, written out; batches are (x, y, index)."""
    w, velocity = torch.zeros(batches[0][0].shape[1], dtype=F64), 0.0
    head = 0 if last is None else max(len(batches) - last, 0)
    for t, (x, y, index) in enumerate(batches):
        weight = outer["weight"].detach() if t < head else outer["weight"]
        w = w.detach() if t <= head else w
        velocity = velocity.detach() if t == head and t else velocity
        weight = torch.sigmoid(weight[index])
        gradient = 2 * ((weight * (x @ w - y))[:, None] * x).mean(0)
        velocity = 0.5 * velocity + gradient
        w = w - 0.1 * velocity
    return w.detach() if head == len(batches) else w


@pytest.mark.parametrize("name", ESTIMATORS)
def test_minibatches_of_a_data_set(name):
    module = load("minibatches")
    x, y = randn(12, 3), randn(12, seed=1)
    rows = [{"x": x[i], "y": y[i]} for i in range(12)]
    generator = torch.Generator().manual_seed(2)
    stream, meta = module.run(rows, 7, 4, generator)
    estimator, last = ESTIMATORS[name]
    problem = mf.Problem(
        module.inner, module.validation, lambda slow, support: {"w": torch.zeros(3, dtype=F64)}
    )
    other = mf.bilevel(problem, solver=mf.SGD(0.1, 7, momentum=0.5), estimator=estimator)
    clean = {"x": randn(5, 3, seed=3), "y": randn(5, seed=4)}
    outer = {"weight": randn(12, seed=5)}
    order = torch.Generator().manual_seed(2)
    rows = torch.cat([torch.randperm(12, generator=order) for _ in range(3)])[:28].split(4)

    def by_task(outer, last=None):
        w = momentum_run(outer, [(x[i], y[i], i) for i in rows], last)
        return ((clean["x"] @ w - clean["y"]) ** 2).mean() + 0 * outer["weight"].sum()

    @dataclasses.dataclass(frozen=True)
    class One(Case):
        def episode(self, i=0):
            return self.episodes

    case = One(problem, outer, mf.Episode(stream, clean))
    for way_name, way in ONE.items():
        want = hypergradient(outer, by_task)
        assert_close(way(meta, case), want, 1e-11)
        if last != 0:
            want = hypergradient(outer, lambda o: by_task(o, last))
            assert_close(way(other, case), want, tolerance(name))
        elif way_name != "backward":
            # The start is a constant: the fast weights do not move with anything.
            assert (way(other, case)["weight"] == 0).all()


@pytest.mark.parametrize("name", [n for n, (_, last) in ESTIMATORS.items() if last != 0])
def test_minibatches_of_many_tasks(name):
    """As tensors with an axis of steps: `mf.PerStep`, under every transform."""
    module = load("minibatches")
    x, y = randn(TASKS, 6, 4, 3), randn(TASKS, 6, 4, seed=1)
    index = torch.randint(12, (TASKS, 6, 4), generator=torch.Generator().manual_seed(2))
    batches = mf.PerStep({"x": x, "y": y, "index": index})
    query = {"x": randn(TASKS, 5, 3, seed=3), "y": randn(TASKS, 5, seed=4)}
    problem = mf.Problem(
        module.inner, module.validation, lambda slow, support: {"w": torch.zeros(3, dtype=F64)}
    )
    estimator, last = ESTIMATORS[name]
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 6, momentum=0.5), estimator=estimator)

    def by_task(outer, i):
        w = momentum_run(outer, [(x[i, t], y[i, t], index[i, t]) for t in range(6)], last)
        return ((query["x"][i] @ w - query["y"][i]) ** 2).mean()

    case = Case(problem, {"weight": randn(12, seed=5)}, mf.Episode(batches, query))
    check(meta, case, by_task, name)


# --- a start made from the support ---------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_generated_start(name):
    module = load("generated_start")
    labels = torch.arange(module.WAY).repeat(TASKS, 2)
    data = [(randn(TASKS, 6, 5, seed=s), labels) for s in (1, 2)]
    case = Case(module.problem, {"embed": randn(5, 4)}, mf.Episode(*data))
    estimator, last = ESTIMATORS[name]
    meta = mf.bilevel(module.problem, solver=mf.SGD(0.1, STEPS), estimator=estimator)

    def loss(fast, slow, data):
        x, y = data
        return F.cross_entropy(torch.tanh(x @ slow["embed"]) @ fast["w"] + fast["b"], y)

    def by_task(outer, i):
        (x, y), query = (tuple(v[i] for v in part) for part in data)
        h = torch.tanh(x @ outer["embed"])
        centres = torch.stack([h[y == k].mean(0) for k in range(module.WAY)])
        first = {"w": 2 * centres.T, "b": -(centres * centres).sum(1)}
        path = by_hand(first, outer, [(x, y)] * STEPS, descent(loss, 0.1), last)
        return loss(path[-1], outer, query)

    check(meta, case, by_task, name)


# --- a learned preconditioner --------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_learned_preconditioner(name):
    module = load("learned_preconditioner")
    data = [(randn(TASKS, 6, 3, seed=s), randn(TASKS, 6, seed=s + 1)) for s in (1, 3)]
    outer = {"w": randn(3), "factor": torch.eye(3, dtype=F64) + 0.2 * randn(3, 3, seed=5)}
    case = Case(module.problem, outer, mf.Episode(*data))
    estimator, last = ESTIMATORS[name]
    solver = module.Preconditioned(0.1, STEPS)
    meta = mf.bilevel(module.problem, solver=solver, estimator=estimator)

    def move(fast, slow, data):
        x, y = data
        gradient = 2 * x.T @ (x @ fast["w"] - y) / len(y)
        return {"w": fast["w"] - 0.1 * slow["factor"] @ slow["factor"].T @ gradient}

    def by_task(outer, i):
        (x, y), (xq, yq) = (tuple(v[i] for v in part) for part in data)
        fast = by_hand({"w": outer["w"]}, outer, [(x, y)] * STEPS, move, last)[-1]
        return ((xq @ fast["w"] - yq) ** 2).mean()

    check(meta, case, by_task, name)


# --- a Hebbian update ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in ("forward", "finite")])
def test_hebbian(name):
    module = load("hebbian")
    x, y = randn(TASKS, STEPS, 5), randn(TASKS, STEPS, 5, seed=1)
    outer = {"w": randn(5, 5, seed=2), "trust": randn((), seed=3), "rate": randn((), seed=4)}
    case = Case(module.problem, outer, mf.Episode(mf.PerStep((x, y)), (x, y)))
    estimator, last = ESTIMATORS[name]
    meta = mf.bilevel(module.problem, solver=module.Hebbian(STEPS), estimator=estimator)

    def move(fast, slow, data):
        (x, y), rate = data, torch.sigmoid(slow["rate"])
        return {"hebb": (1 - rate) * fast["hebb"] + rate * x[:, None] * y}

    def by_task(outer, i):
        zeros = {"hebb": torch.zeros(5, 5, dtype=F64)}
        batches = list(zip(x[i], y[i], strict=True))
        hebb = by_hand(zeros, outer, batches, move, last)[-1]["hebb"]
        recalled = torch.tanh(x[i] @ (outer["w"] + outer["trust"] * hebb))
        return ((recalled - y[i]) ** 2).mean()

    check(meta, case, by_task, name)


@pytest.mark.parametrize("name", ["forward", "finite"])
def test_hebbian_has_no_second_derivative_to_multiply_with(name):
    module = load("hebbian")
    x = randn(STEPS, 5)
    outer = {"w": randn(5, 5), "trust": randn(()), "rate": randn(())}
    solver = module.Hebbian(STEPS)
    meta = mf.bilevel(module.problem, solver=solver, estimator=ESTIMATORS[name][0])
    with pytest.raises(mf.errors.ProblemError, match=r"Hebbian\.direction replaces it"):
        meta(outer, mf.Episode(mf.PerStep((x, x)), (x, x)))
