"""The trial evaluation: what it refuses, what it must not refuse, and what it leaves behind."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import metafocus as mf
from metafocus.preflight import preflight, rebuilt

pytestmark = pytest.mark.usefixtures("float64")

OUTER = {
    "w": torch.tensor([1.0, 2.0]).double().requires_grad_(),
    "c": torch.tensor(3.0).double().requires_grad_(),
}
SOLVER = mf.SGD(0.1, 2)
EXPLICIT = {
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(last=1, hvp=mf.hvp_finite()),
    "Implicit": mf.Implicit(mf.CG(2)),
}
TAPE = {"graph": mf.Unrolled(), "first": mf.FirstOrder(), "last": mf.Unrolled(last=1)}


def outer_loss(fast, slow, x):
    return sum((v**2).sum() for v in fast.values())


def run(
    inner,
    *,
    init=lambda slow, support: {"w": slow["w"]},
    estimator=TAPE["graph"],
    outer=OUTER,
    x=None,
):
    problem = mf.Problem(inner, outer_loss, init)
    meta = mf.bilevel(problem, solver=SOLVER, estimator=estimator)
    return meta(outer, (torch.ones(2) if x is None else x, torch.ones(2)))


# --- keys -----------------------------------------


def test_a_key_that_init_does_not_return():
    with pytest.raises(
        mf.errors.ProblemError,
        match=r"inner_loss asks for 'b'; init returned \['w'\] and outer holds \['c', 'w'\]",
    ):
        run(lambda fast, slow, x: (fast["w"] * fast["b"]).sum())


def test_a_key_that_outer_does_not_hold():
    with pytest.raises(mf.errors.ProblemError, match="inner_loss asks for 'scale'; init returned"):
        run(lambda fast, slow, x: (fast["w"] * slow["scale"]).sum())


def test_a_key_error_of_the_data_is_left_alone():
    with pytest.raises(KeyError, match="pixels") as caught:
        run(lambda fast, slow, x: (fast["w"] * x["pixels"]).sum(), x={"labels": torch.ones(2)})
    assert not isinstance(caught.value, mf.errors.ProblemError)


def test_a_weight_that_the_loss_does_not_depend_on():
    with pytest.raises(
        mf.errors.ProblemError,
        match=r"does not depend on the fast weight 'c'.* init returned \['c', 'w'\]",
    ):
        run(lambda fast, slow, x: (fast["w"] * x).sum(), init=lambda slow, _: dict(slow))


READERS = {
    "getitem": lambda f: f["w"].sum() + f["c"],
    "get": lambda f: f.get("w").sum() + f.get("c", 0),
    "itemgetter": lambda f: sum(v.sum() for v in operator.itemgetter("w", "c")(f)),
    "values": lambda f: sum(v.sum() for v in f.values()),
    "items": lambda f: sum(v.sum() for _, v in f.items()),
    "keys": lambda f: sum(f[k].sum() for k in f),
    "dict": lambda f: sum(v.sum() for v in dict(f).values()),
    "stars": lambda f: sum(v.sum() for v in {**f}.values()),
    "update": lambda f: sum(v.sum() for v in _updated(f).values()),
    "or": lambda f: sum(v.sum() for v in (f | {}).values()),
    "ror": lambda f: sum(v.sum() for v in ({} | f).values()),
    "copy": lambda f: sum(v.sum() for v in f.copy().values()),
    "pop": lambda f: f.pop("w").sum() + f.pop("c"),
    "comprehension": lambda f: sum({k: f[k] for k in f}[k].sum() for k in f),
    "pytree operators": lambda f: sum((v * 2).sum() for v in pytree.tree_leaves(f)),
    "pytree methods": lambda f: sum(v.mul(2).sum() for v in pytree.tree_leaves(f)),
    "tree_map": lambda f: sum(v.sum() for v in pytree.tree_map(torch.sin, f).values()),
    "func.grad": lambda f: torch.func.grad(lambda g: (g["w"] ** 2).sum() * g["c"])(f)["w"].sum(),
    "match": lambda f: _matched(f),
}


def _updated(f):
    new = {}
    new.update(f)
    return new


def _matched(f):
    match f:
        case {"w": w, "c": c}:
            return w.sum() * c
    raise AssertionError


@pytest.mark.parametrize("name", READERS)
def test_every_way_to_read_a_dict_counts(name):
    loss, aux = run(
        lambda fast, slow, x: READERS[name](fast) ** 2, init=lambda slow, support: dict(slow)
    )
    assert loss.isfinite()
    # It was adapted, both of it.
    assert (aux.params["w"] != OUTER["w"]).all()
    assert aux.params["c"] != OUTER["c"]


def test_functional_call_reads_everything_and_an_unknown_name_is_refused():
    module = nn.Linear(2, 1, bias=False)
    module.requires_grad_(False)
    weight = {"weight": torch.ones(1, 2)}

    def inner(fast, slow, x):
        return torch.func.functional_call(module, fast, (x,)).sum() ** 2

    # Nothing depends on the outer parameters here: only the value counts.
    with torch.no_grad():
        loss, _ = run(inner, init=lambda slow, support: weight)
    assert loss.isfinite()
    with pytest.raises(
        mf.errors.ProblemError,
        match=r"does not know one of the fast weights \['layer.weight'\].*as in dict\(module",
    ):
        run(inner, init=lambda slow, support: {"layer.weight": torch.ones(1, 2)})


@pytest.mark.parametrize("fast", [{"weigth": (1, 2)}, {"weight": (1, 2), "bais": (1,)}])
def test_functional_call_with_a_misspelt_leaf(fast):
    """torch ignores it without an error."""
    module = nn.Linear(2, 1)

    def inner(fast, slow, x):
        return torch.func.functional_call(module, fast, (x,)).sum() ** 2

    name = list(fast)[-1]
    with pytest.raises(
        mf.errors.ProblemError, match=rf"does not depend on the fast weights? \[?'{name}'"
    ):
        run(inner, init=lambda slow, support: {k: torch.ones(shape) for k, shape in fast.items()})


def test_a_module_that_does_not_run_is_let_through():
    """As an expert that no token is routed to."""
    experts = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    start = {k: v.detach() for k, v in experts.named_parameters()}

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, x):
            return self.experts[0](x)

    module = Routed().requires_grad_(False)

    def inner(fast, slow, x):
        return torch.func.functional_call(module, fast, (x,)).sum() ** 2

    # Nothing depends on the outer parameters here: only the value counts.
    with torch.no_grad():
        _, aux = run(inner, init=lambda slow, x: {f"experts.{k}": v for k, v in start.items()})
    assert torch.equal(aux.params["experts.1.weight"], start["1.weight"])


def test_an_error_of_the_loss_itself_comes_through():
    with pytest.raises(RuntimeError, match="must match"):
        run(lambda fast, slow, x: (fast["w"] * torch.ones(3)).sum())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        run(lambda fast, slow, x: fast["w"].nonsense)


# --- what comes back -----------------------------------------


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w: w, r"inner_loss must return a scalar, got shape \[2\]. Reduce it: .mean\(\)"),
        (lambda w: w[:1], r"inner_loss must return a scalar, got shape \[1\]"),
        (lambda w: 3.0, "inner_loss must return a scalar tensor, got float"),
        (lambda w: (w.sum(), 1), "inner_loss must return a scalar tensor, got tuple"),
        (lambda w: w.sum().long(), "inner_loss must return a floating-point scalar, got torch.int"),
    ],
)
def test_inner_losses_that_are_no_scalars(result, message, when):
    wrong = [when == "first"]

    def inner(fast, slow, x):
        return result(fast["w"]) if wrong[0] else fast["w"].sum()

    problem = mf.Problem(inner, outer_loss, lambda slow, support: {"w": slow["w"]})
    meta = mf.bilevel(problem, solver=SOLVER, estimator=mf.Unrolled())
    episode = (torch.ones(2), torch.ones(2))
    if when == "later":
        meta(OUTER, episode)
        wrong[0] = True
    with pytest.raises(mf.errors.ProblemError, match=message):
        meta(OUTER, episode)


# --- closures -----------------------------------------


def _closed(c):
    return lambda fast, slow, x: ((fast["w"] - c * x) ** 2).sum()


def _meta(inner, estimator, solver=None):
    problem = mf.Problem(inner, outer_loss, lambda slow, support: {"w": slow["w"]})
    meta = mf.bilevel(problem, solver=solver or mf.SGD(0.1, 2), estimator=estimator)
    return lambda: meta({"w": OUTER["w"]}, (torch.tensor([3.0, 4.0]), torch.ones(2)))[0]


LEVELS = {
    "tape": lambda f: f(torch.tensor(1.0, requires_grad=True)),
    "not a leaf": lambda f: f(torch.tensor(1.0, requires_grad=True) * 2),
    "no_grad": lambda f: torch.no_grad()(f)(torch.tensor(1.0, requires_grad=True)),
    "grad": lambda f: torch.func.grad(f)(torch.tensor(1.0)),
    "jvp": lambda f: torch.func.jvp(f, (torch.tensor(1.0),), (torch.tensor(1.0),)),
    "vjp": lambda f: torch.func.vjp(f, torch.tensor(1.0)),
    "grad(grad)": lambda f: torch.func.grad(
        lambda c: torch.func.grad(lambda d: f(c) * d)(torch.tensor(1.0))
    )(torch.tensor(1.0)),
    "jvp(grad)": lambda f: torch.func.jvp(
        lambda c: torch.func.grad(lambda d: f(c) * d)(torch.tensor(1.0)),
        (torch.tensor(1.0),),
        (torch.tensor(1.0),),
    ),
    "hessian": lambda f: torch.func.hessian(f)(torch.tensor(1.0)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", EXPLICIT)
def test_closures_over_tracked_tensors_are_refused_at_every_level(name, level):
    with pytest.raises(
        mf.errors.ClosureError,
        match=r"inner_loss closes over a tensor that requires grad and is not in outer.*"
        r"Pass it in outer .*requires_grad_\(False\).*Unrolled\(\) without recompute",
    ):
        LEVELS[level](lambda c: _meta(_closed(c), EXPLICIT[name])())


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("name", EXPLICIT)
def test_closures_over_constants_are_fine(name):
    frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)
    assert _meta(_closed(frozen), EXPLICIT[name])().isfinite()
    assert torch.func.grad(lambda w: _meta(_closed(torch.tensor(2.0)), EXPLICIT[name])() * w)(
        torch.tensor(1.0)
    ).isfinite()
    detached = (torch.tensor(1.0, requires_grad=True) * 2).detach()
    assert _meta(_closed(detached), EXPLICIT[name])().isfinite()


@pytest.mark.parametrize("level", ["tape", "grad", "jvp"])
def test_the_graph_estimator_gets_closures_right(level):
    # w1 = w - 0.2 (w - c x), twice: w2 = 0.64 w + 0.36 c x; the loss is |w2|^2.
    w, x, c = OUTER["w"], torch.tensor([3.0, 4.0]), torch.tensor(1.5)
    want = (2 * (0.64 * w + 0.36 * c * x) * 0.36 * x).sum()

    def f(c):
        return _meta(_closed(c), mf.Unrolled())()

    if level == "tape":
        leaf = c.clone().requires_grad_()
        f(leaf).backward()
        got = leaf.grad
    elif level == "grad":
        got = torch.func.grad(f)(c)
    else:
        got = torch.func.jvp(f, (c,), (torch.tensor(1.0),))[1]
    # A handful of products.
    assert abs(got - want) < 1e-13


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.parametrize("kind", ["function", "tensor"])
def test_a_rate_that_closes_over_a_tracked_tensor_is_refused(name, kind):
    rate = torch.tensor(0.1, requires_grad=True)
    solver = mf.SGD(rate if kind == "tensor" else lambda _: rate, 2)
    inner = _closed(torch.tensor(1.0))
    with pytest.raises(
        mf.errors.ClosureError, match=r"the solver \(its lr\?\) closes over a tensor that"
    ):
        _meta(inner, EXPLICIT[name], solver)()
    loss = _meta(inner, mf.Unrolled(), solver)()
    loss.backward()
    # w2 = c x + (1 - 2 r)^2 (w - c x).
    w, x = OUTER["w"], torch.tensor([3.0, 4.0])
    want = (2 * (x + 0.64 * (w - x)) * (-4 * 0.8) * (w - x)).sum()
    assert abs(rate.grad - want) < 1e-12


def test_first_order_and_adapt_hold_a_closed_rate_constant():
    rate = torch.tensor(0.1, requires_grad=True)
    solver = mf.SGD(lambda _: rate, 2, momentum=0.5)
    _meta(_closed(torch.tensor(1.0)), mf.FirstOrder(), solver)
    problem = mf.Problem(
        _closed(torch.tensor(1.0)), outer_loss, lambda slow, support: {"w": slow["w"]}
    )
    solution = mf.adapt(problem, {"w": OUTER["w"]}, torch.ones(2), solver=solver)
    assert not solution.params["w"].requires_grad
    leaf = OUTER["w"].detach().clone().requires_grad_()
    meta = mf.bilevel(problem, solver=solver, estimator=mf.FirstOrder())
    meta({"w": leaf}, (torch.ones(2), torch.ones(2)))[0].backward()
    assert rate.grad is None
    assert leaf.grad is not None


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_trainable_module_with_a_partial_outer_is_refused(name):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def inner(fast, slow, x):
        return torch.func.functional_call(module, fast, (x,)).sum() ** 2

    problem = mf.Problem(inner, inner)
    partial = {k: v for k, v in module.named_parameters() if k.startswith("1.")}
    meta = mf.bilevel(problem, solver=SOLVER, estimator=EXPLICIT[name])
    episode = (torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(mf.errors.ClosureError, match="closes over a tensor that requires grad"):
        meta(partial, episode)
    if name == "Implicit":
        return
    complete = dict(module.named_parameters())
    mf.bilevel(problem, solver=SOLVER, estimator=EXPLICIT[name])(complete, episode)[0].backward()
    assert all(p.grad is not None for p in module.parameters())
    module[0].requires_grad_(False)
    assert meta(partial, episode)[0].isfinite()


def test_a_refused_first_call_is_refused_again():
    c = torch.tensor(1.0, requires_grad=True)
    call = _meta(_closed(c), EXPLICIT["recompute"])
    for _ in range(2):
        with pytest.raises(mf.errors.ClosureError):
            call()
    c.requires_grad_(False)
    assert call().isfinite()


# --- what it leaves behind -----------------------------------------


@pytest.mark.parametrize("estimator", [*TAPE.values(), EXPLICIT["recompute"]], ids=str)
def test_random_numbers_of_the_trial_are_given_back(estimator):
    def inner(fast, slow, x):
        return (torch.nn.functional.dropout(fast["w"]) ** 2).sum()

    def call(meta):
        torch.manual_seed(5)
        loss, aux = meta(OUTER, (torch.ones(2), torch.ones(2)))
        return loss, aux.params["w"], torch.get_rng_state()

    problem = mf.Problem(inner, outer_loss, lambda slow, support: {"w": slow["w"]})
    meta = mf.bilevel(problem, solver=SOLVER, estimator=estimator)
    first, second = call(meta), call(meta)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("estimator", [*TAPE.values(), *EXPLICIT.values()], ids=str)
@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
def test_a_random_init_is_drawn_once_per_call(estimator):
    calls = []

    def init(slow, support):
        calls.append(1)
        return {"w": slow["w"] + torch.rand(2)}

    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(), outer_loss, init
    )
    meta = mf.bilevel(problem, solver=SOLVER, estimator=estimator)
    for n in (1, 2):
        torch.manual_seed(5)
        loss, _ = meta(OUTER, (torch.ones(2), torch.ones(2)))
        assert len(calls) == n
        if n == 1:
            first = loss
    # The probed call used the numbers that any call uses.
    assert torch.equal(first, loss)
    calls.clear()
    mf.adapt(problem, OUTER, torch.ones(2), solver=SOLVER)
    assert len(calls) == 1


def test_the_loss_is_tried_once_not_at_every_call():
    calls = []

    def inner(fast, slow, x):
        calls.append(1)
        return (fast["w"] ** 2).sum()

    problem = mf.Problem(inner, outer_loss, lambda slow, support: {"w": slow["w"]})
    meta = mf.bilevel(problem, solver=SOLVER, estimator=mf.Unrolled())
    for n in (3, 5, 7):
        meta(OUTER, (torch.ones(2), torch.ones(2)))
        assert len(calls) == n


def test_the_trial_leaves_no_gradients_and_no_changed_arguments():
    weight = nn.Parameter(torch.ones(2))
    slow = {"w": torch.ones(2, requires_grad=True)}
    problem = mf.Problem(
        lambda fast, slow, x: (fast["w"] * weight).sum(),
        outer_loss,
        lambda slow, support: dict(slow),
    )
    start = problem.start(slow, None)
    preflight(problem.inner_loss, SOLVER, start, slow, None, explicit=False)
    assert start["w"] is slow["w"]
    assert weight.grad is None and slow["w"].grad is None
    assert list(slow) == ["w"]


# --- a meta loss that is built at every step ------------------------------------------------------


@pytest.fixture
def limit(monkeypatch):
    monkeypatch.setattr(rebuilt, "LIMIT", 8)
    monkeypatch.setattr(rebuilt, "_ONCE", {})


def built(**changes):
    """Return a meta loss, with functions of its own each time."""
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(),
        outer_loss,
        lambda slow, support: {"w": slow["w"]},
    )
    parts = {"solver": mf.SGD(0.1, 2), "estimator": mf.FirstOrder(), **changes}
    return mf.bilevel(problem, **parts)


def once(meta):
    return meta(OUTER, (torch.ones(2), torch.ones(2)))


def test_building_a_meta_loss_at_every_step_is_warned_of_once(limit):
    for _ in range(7):
        once(built())
    with pytest.warns(
        mf.errors.RebuiltWarning, match=r"bilevel was called 8 times.*before the loop"
    ):
        once(built())
    # Any further warning would be an error.
    for _ in range(20):
        once(built())


def test_other_ways_to_build_many_are_not(limit):
    for steps in range(1, 12):
        once(built(solver=mf.SGD(0.1, steps)))
    for _ in range(12):
        built()
    for _ in range(12):
        meta = built()
        once(meta)
        once(meta)
    meta = built()
    for _ in range(12):
        once(meta)
