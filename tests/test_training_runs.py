"""Recipes of training runs and `mf.smoothness`, against plain torch and finite differences."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close

import metafocus as mf
from metafocus import recipes
from metafocus.recipes._datamodeling import spearman

F64 = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=G, dtype=F64)
Y = torch.randn(24, generator=G, dtype=F64)
QUERY = {
    "x": torch.randn(3, 5, generator=G, dtype=F64),
    "y": torch.randn(3, generator=G, dtype=F64),
}
ROWS = [{"x": a, "y": b} for a, b in zip(X, Y, strict=True)]
STEPS = 15
START = {
    "w1": torch.randn(5, 4, generator=G, dtype=F64) / 2,
    "w2": torch.randn(4, generator=G, dtype=F64) / 2,
}
SOLVER = mf.SGD(0.1, STEPS, momentum=0.9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def predict(p, x):
    return torch.tanh(x @ p["w1"]) @ p["w2"]


def losses(p, batch):
    return (predict(p, batch["x"]) - batch["y"]) ** 2


def start():
    return START


def stream(steps=STEPS):
    return mf.Batches.from_dataset(ROWS, batch_size=6, steps=steps, generator=seeded())


def by_hand(weight, batches):
    """The losses of the queries after training on weighted examples, on the tape."""
    p = {k: v.clone().requires_grad_() for k, v in START.items()}
    velocity = {k: torch.zeros_like(v) for k, v in p.items()}
    for batch in batches:
        loss = (weight[batch["index"]] * losses(p, batch)).mean()
        grads = torch.autograd.grad(loss, list(p.values()), create_graph=True)
        velocity = {k: 0.9 * velocity[k] + g for k, g in zip(p, grads, strict=True)}
        p = {k: v - 0.1 * velocity[k] for k, v in p.items()}
    return losses(p, QUERY)


# --- attribution -----------------------------------------------------------------------------

ESTIMATORS = {
    "default": None,
    "graph": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "schedule": mf.Unrolled(store=mf.stores.schedule(3)),
}


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_are_the_jacobian_by_the_weights(name, at_once):
    train = stream()
    found = recipes.attribution(
        losses,
        start,
        train,
        QUERY,
        solver=SOLVER,
        estimator=ESTIMATORS[name],
        queries_at_once=at_once,
    )
    weight = torch.ones(24, dtype=F64, requires_grad=True)
    value = by_hand(weight, [train.at(t) for t in range(STEPS)])
    want = [torch.autograd.grad(v, weight, retain_graph=True)[0] for v in value]
    assert_close(found.scores, torch.stack(want), 1e-12)
    assert_close(found.losses, value.detach(), 1e-12)
    assert not found.scores.requires_grad


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_retrained(at_once):
    train = stream()
    found = recipes.attribution(losses, start, train, QUERY, solver=SOLVER, runs_at_once=at_once)
    weights = torch.rand(3, 24, generator=seeded(), dtype=F64)
    want = [by_hand(w, [train.at(t) for t in range(STEPS)]).detach() for w in weights]
    assert_close(found.retrained(weights), torch.stack(want), 1e-12)
    assert_close(found.retrained(torch.ones(1, 24, dtype=F64))[0], found.losses, 1e-12)


@pytest.mark.parametrize(
    "weights", [torch.ones(24), torch.ones(2, 23), [[1.0] * 24]], ids=["one", "short", "list"]
)
def test_retraining_needs_a_weight_for_each_row(weights):
    found = recipes.attribution(losses, start, stream(), QUERY, solver=SOLVER)
    with pytest.raises(mf.errors.ProblemError, match=r"\[runs, 24\].*weights\[None\]"):
        found.retrained(weights)


def test_another_process_can_retrain():
    found = recipes.attribution(losses, start, stream(), QUERY, solver=SOLVER)
    weights = torch.rand(2, 24, generator=seeded(), dtype=F64)
    there = pickle.loads(pickle.dumps(found.retrained))
    assert torch.equal(there(weights), found.retrained(weights))


def test_scores_of_adam_are_exact_at_the_weights_of_one():
    solver = mf.Adam(0.01, STEPS)
    found = recipes.attribution(losses, start, stream(), QUERY, solver=solver)
    step = 1e-5 * torch.eye(24, dtype=F64)
    difference = (found.retrained(1 + step) - found.retrained(1 - step)) / 2e-5
    # A central difference of step 1e-5 has an error of about 1e-10.
    assert_close(found.scores, difference.T, 1e-6)


def test_attribution_refuses_what_it_cannot_attribute():
    with pytest.raises(mf.errors.ProblemError, match=r"rows of its batches.*from_dataset"):
        recipes.attribution(losses, start, mf.Batches(lambda t: t, 3), QUERY, solver=SOLVER)
    with pytest.raises(mf.errors.ProblemError, match=r"each of the 6 rows.*got shape \[\]"):
        recipes.attribution(lambda p, b: losses(p, b).mean(), start, stream(), QUERY, solver=SOLVER)
    wrong = "start must be a function"
    for given in (START, torch.nn.Linear(1, 1)):
        with pytest.raises(mf.errors.ProblemError, match=wrong):
            recipes.attribution(losses, given, stream(), QUERY, solver=SOLVER)
    with pytest.raises(mf.errors.ProblemError, match=r"start\(\) must be a dict of tensors"):
        recipes.attribution(losses, lambda: list(START), stream(), QUERY, solver=SOLVER)
    with pytest.raises(mf.errors.ProblemError, match="losses must be a function"):
        recipes.attribution(lambda f, s, b: 0, start, stream(), QUERY, solver=SOLVER)
    with pytest.raises(mf.errors.ProblemError, match=r"FirstOrder\(\) passes no derivative"):
        first = mf.FirstOrder()
        recipes.attribution(losses, start, stream(), QUERY, solver=SOLVER, estimator=first)
    one_query = r"one value for each query, got shape \[\]"

    def mean(p, batch):
        return losses(p, batch).mean()

    with pytest.raises(mf.errors.ProblemError, match=one_query):
        recipes.attribution(losses, start, stream(), QUERY, solver=SOLVER, query_losses=mean)
    with pytest.raises(mf.errors.ProblemError, match=one_query):
        recipes.influence(losses, START, QUERY, QUERY, query_losses=mean, damping=1.0)


def test_influence_equals_the_dense_formula():
    data, damping = {"x": X, "y": Y}, 0.5
    got = recipes.influence(losses, START, data, QUERY, damping=damping)

    def flat(v):
        return {"w1": v[:20].reshape(5, 4), "w2": v[20:]}

    at = torch.cat([v.reshape(-1) for v in START.values()])
    hessian = torch.func.hessian(lambda v: losses(flat(v), data).mean())(at)
    each = torch.func.jacrev(lambda v: losses(flat(v), data))(at)
    query = torch.func.jacrev(lambda v: losses(flat(v), QUERY))(at)
    inverse = torch.linalg.inv(hessian + damping * torch.eye(24, dtype=F64))
    # Twice as many products as dimensions: CG has converged.
    assert_close(got, -query @ inverse @ each.T / 24, 1e-8)
    with pytest.raises(ValueError, match="damping must be positive"):
        recipes.influence(losses, START, data, QUERY, damping=0.0)


def test_the_score_by_an_executor_is_that_by_vmap():
    # The predictions after a slow run are nearly linear in the weights.
    found = recipes.attribution(
        losses,
        start,
        stream(),
        QUERY,
        solver=mf.SGD(0.02, STEPS),
        query_losses=lambda p, batch: predict(p, batch["x"]),
    )

    def lds(**options):
        return recipes.linear_datamodeling_score(
            found.scores, found.retrained, subsets=12, drop=0.1, generator=seeded(), **options
        )

    alone = lds()
    with ThreadPoolExecutor(1) as pool:
        by_one = lds(executor=pool)
    assert_close(by_one.found, alone.found, 1e-12)
    assert alone.each.shape == (3,)
    # The weights keep about nine tenths of the examples, and one of ten times.
    assert alone.mean > 0.9
    shuffled = found.scores[:, torch.randperm(24, generator=seeded())]
    wrong = recipes.linear_datamodeling_score(
        shuffled, found.retrained, subsets=12, drop=0.1, generator=seeded()
    )
    assert wrong.mean < alone.mean - 0.3


@pytest.mark.parametrize("drop", [0.0, 0.02])
def test_a_score_over_equal_runs_is_refused(drop):
    with pytest.raises(ValueError, match=r"of 24 examples leaves none out. Raise drop to 0.042"):
        recipes.linear_datamodeling_score(
            torch.ones(1, 24), lambda weights: weights[:, :1], drop=drop, generator=seeded()
        )


def test_spearman_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    a = torch.randint(0, 5, (40,), generator=seeded()).double()
    b = torch.randn(40, generator=seeded(1), dtype=F64)
    assert_close(spearman(a, b), torch.tensor(stats.spearmanr(a, b).statistic), 1e-12)


# --- problems --------------------------------------------------------------------------------


def central(meta, outer, episode, name, h=1e-5):
    """The derivative along ones of one outer parameter."""

    def at(by):
        with torch.no_grad():
            return meta({**outer, name: outer[name] + by}, episode)[0]

    return (at(h) - at(-h)) / (2 * h)


def rate(slow, batch):
    return batch["x"] @ slow["rater"]


def net(slow, batch, each):
    return torch.sigmoid(slow["slope"] * each + slow["bias"])


PROBLEMS = {
    "datarater": (
        recipes.datarater(losses, start, rate),
        {"rater": torch.linspace(-1, 1, 5, dtype=F64)},
    ),
    "weights": (
        recipes.weights(losses, start, net),
        {"slope": torch.tensor(0.3, dtype=F64), "bias": torch.tensor(-0.1, dtype=F64)},
    ),
}


@pytest.mark.parametrize("store", [None, mf.stores.segments(4)], ids=["graph", "segments"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_data_weights_through_a_run_of_adam(name, store):
    problem, outer = PROBLEMS[name]
    meta = mf.bilevel(problem, solver=mf.Adam(0.05, STEPS), estimator=mf.Unrolled(store=store))
    episode = mf.Episode(stream(), QUERY)
    grads, _ = mf.hypergrad(meta)(outer, episode)
    for k, g in grads.items():
        # A central difference of step 1e-5 has an error of about 1e-10.
        assert_close(g.sum(), central(meta, outer, episode, k), 1e-6)


def test_a_rater_in_windows():
    problem, outer = PROBLEMS["datarater"]
    windows = mf.algorithms.Windows(problem, mf.SGD(0.05, 5))
    window = windows.init(outer, stream())
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    for _ in range(3):
        loss, (window, _) = windows.loss(leaves, window, mf.Episode(stream(), QUERY))
        loss.backward()
    assert leaves["rater"].grad.abs().sum() > 0


def test_distillation_learns_images_and_rates():
    def loss(w, data):
        return F.mse_loss(predict(w, data[0]), data[1])

    meta = recipes.distill(loss, start, Y[:4], steps=200)
    outer = {"x": X[:4].clone(), "log_lr": torch.full((200,), -3.0, dtype=F64)}
    episode = mf.Episode(None, (X, Y))
    grads, (before, _) = mf.hypergrad(meta)(outer, episode)
    assert_close(grads["x"].sum(), central(meta, outer, episode, "x"), 1e-6)
    assert_close(grads["log_lr"].sum(), central(meta, outer, episode, "log_lr"), 1e-6)
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    optimizer = torch.optim.Adam(leaves.values(), 0.02)
    for _ in range(15):
        optimizer.zero_grad()
        meta(leaves, episode)[0].backward()
        optimizer.step()
    assert meta({k: v.detach().requires_grad_() for k, v in leaves.items()}, episode)[0] < before


FORMS = {"no steps": (0, False), "steps": (3, False), "on top": (3, True)}


@pytest.mark.parametrize("form", FORMS)
def test_generated_starts(form):
    steps, on_top = FORMS[form]

    def loss(fast, slow, data):
        return ((predict(fast, data["x"]) - data["y"]) ** 2).mean()

    def generate(slow, support):
        return {k: v * slow["gain"] * support["y"].mean() for k, v in START.items()}

    base = mf.Problem(loss, loss, lambda slow, support: START)
    problem = recipes.generated(base, generate, on_top=on_top)
    outer = {"gain": torch.tensor(0.7, dtype=F64)}
    support = {"x": X, "y": Y + 1}
    factor = outer["gain"] * support["y"].mean() + (1 if on_top else 0)
    assert_close(problem.init(outer, support)["w2"], START["w2"] * factor, 1e-14)
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps), estimator=mf.Unrolled())
    episode = mf.Episode(support, QUERY)
    grads, _ = mf.hypergrad(meta)(outer, episode)
    assert_close(grads["gain"], central(meta, outer, episode, "gain"), 1e-6)


@pytest.mark.parametrize("recurrent", [False, True], ids=["mlp", "lstm"])
def test_a_learned_optimiser(recurrent):
    rule = recipes.LearnedOptimiser(10, recurrent=recurrent, hidden=4, scale=0.05)

    def loss(fast, slow, data):
        return losses(fast, {"x": X, "y": Y}).mean()

    problem = mf.Problem(loss, loss, lambda slow, _: START)
    outer = rule.start(seeded(), F64)
    episode = mf.Episode(None, None)
    meta = mf.bilevel(problem, solver=rule, estimator=mf.Unrolled(store=mf.stores.schedule(3)))
    grads, (first, _) = mf.hypergrad(meta)(outer, episode)
    for k, g in grads.items():
        # Signs of gradients and momenta bend within 1e-3, so a step of 1e-6.
        assert_close(g.sum(), central(meta, outer, episode, k, 1e-6), 1e-4)
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    optimizer = torch.optim.Adam(leaves.values(), 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        value, _ = meta(leaves, episode)
        value.backward()
        optimizer.step()
    assert value < 0.95 * first


def test_a_learned_optimiser_by_pes():
    rule = recipes.LearnedOptimiser(10, hidden=4, scale=0.05)

    def loss(fast, slow, data):
        return losses(fast, {"x": X, "y": Y}).mean()

    problem = mf.Problem(loss, loss, lambda slow, _: START)
    outer = rule.start(seeded(), F64)
    method = mf.algorithms.PES(mf.algorithms.Windows(problem, rule), sigma=0.01, pairs=4)
    state = method.init(outer, None)
    grads, *_ = method.step(outer, state, mf.Episode(None, None), generator=seeded())
    assert sorted(grads) == sorted(outer)


# --- smoothness ------------------------------------------------------------------------------


def rough(p, batch):
    """Predictions with kinks that a small move crosses."""
    return (
        torch.sign(batch["x"] @ p["w1"]).mul(batch["x"] @ p["w1"] * 8).frac() @ p["w2"] - batch["y"]
    ) ** 2


def report(losses, solver, dtype=F64, upper=None, **options):
    def of(tree):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tree.items()}

    def inner(fast, slow, batch):
        return (slow["weight"][batch["index"]] * losses(fast, of(batch))).mean()

    problem = mf.Problem(
        inner,
        lambda fast, slow, batch: (upper or losses)(fast, of(batch)).mean(),
        lambda slow, _: of(START),
    )
    outer = {"weight": torch.ones(24, dtype=dtype)}
    return mf.smoothness(
        problem,
        outer,
        mf.Episode(stream(), QUERY),
        solver=solver,
        generator=seeded(),
        **options,
    )


def test_a_smooth_run_is_trustworthy():
    found = report(losses, SOLVER)
    assert found.verdict == "trustworthy"
    assert found.value > 0.95
    assert all(p.error < 1e-2 for p in found.probes)
    assert "smoothness" in str(found) and "central difference" in str(found)


def test_a_run_at_the_edge_of_chaos_is_not_smooth():
    found = report(rough, mf.SGD(0.5, STEPS))
    assert found.verdict == "not smooth"
    assert found.value < report(losses, SOLVER).value


def test_a_biased_metagradient_is_found():
    found = report(losses, SOLVER, estimator=mf.Unrolled(last=1))
    assert found.verdict == "wrong"


def test_a_loss_that_bends_within_a_step_is_told_from_a_wrong_gradient():
    def bent(p, batch):
        return torch.sin(300 * losses(p, batch))

    found = report(losses, mf.SGD(0.02, 3), h=0.3, upper=bent)
    assert found.verdict == "curved"
    assert any(p.step < 0.3 for p in found.probes)
    assert all(p.error < 1e-2 for p in found.probes)


def test_bfloat16_hides_small_moves():
    found = report(losses, SOLVER, torch.bfloat16, h=1e-4)
    assert found.verdict in ("too coarse", "no effect")


def test_what_has_no_effect():
    problem = mf.Problem(
        lambda fast, slow, d: losses(fast, {"x": X, "y": Y}).mean(),
        lambda fast, slow, d: losses(fast, QUERY).mean(),
        lambda slow, _: START,
    )
    found = mf.smoothness(
        problem,
        {"unused": torch.ones(2, dtype=F64)},
        mf.Episode(None, None),
        solver=SOLVER,
        generator=seeded(),
    )
    assert found.verdict == "no effect"


def test_bad_settings():
    with pytest.raises(ValueError, match="h must be positive"):
        report(losses, SOLVER, h=0.0)
    with pytest.raises(ValueError, match="directions must be an integer >= 1"):
        report(losses, SOLVER, directions=0)


def test_attribution_warns_of_a_run_that_is_not_smooth():
    def scores(losses, solver):
        return recipes.attribution(losses, start, stream(), QUERY, solver=solver, directions=2)

    found = scores(losses, SOLVER)
    assert found.trust.verdict == "trustworthy" and len(found.trust.probes) == 2
    with pytest.warns(mf.errors.NotSmoothWarning, match="may not predict.*not smooth"):
        scores(rough, mf.SGD(0.5, STEPS))
