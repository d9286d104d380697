"""Every operation of docs/boat.md against formulas on flat vectors, written without metafocus.

The functions and estimators under test are those of the page. With two exceptions, which say so,
both sides do the same arithmetic in another order: float64 and rtol 1e-9 leave room for a few
hundred roundings and for nothing else.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd import grad

import metafocus as mf

PAGE = Path(__file__).parent.parent / "docs" / "boat.md"
F64 = torch.float64
GEN = torch.Generator().manual_seed(0)
LR, STEPS, TASKS = 0.1, 6, 3
OPERATIONS = "NGD GDA DI DM RAD RGT PTT CG NS IAD FD IGA FOA VSO VFO MESO PGDO GAFFO ALTO".split()


def randn(*shape):
    return torch.randn(*shape, generator=GEN, dtype=F64)


ROOT = randn(5, 5)
H = torch.eye(5, dtype=F64) + 0.2 * ROOT @ ROOT.T
B, C = randn(5, 4), randn(5, 4)
X, Y0 = randn(4), randn(5)
S, Q = randn(TASKS, 5), randn(TASKS, 5)


def G(y, x, s, quartic=0.1):
    """Convex, not quadratic unless quartic=0, and positive, as BOAT's form of VSO asks."""
    bent = quartic * (y**4 * (1.5 + (C @ x).tanh())).sum()
    return 10 + 0.5 * y @ H @ y - y @ (B @ x + s) + (x * x).sum() + bent


def F(y, x, q):
    return 0.5 * ((y - q) ** 2).sum() + (y * (C @ x).sin()).sum() + (x**3).sum()


def join(fast):
    return torch.cat([fast["a"], fast["b.c"].reshape(-1)])


def split(y):
    return {"a": y[:3], "b.c": y[3:].reshape(2, 1)}


def problem(init=lambda slow, support: split(Y0), quartic=0.1):
    return mf.Problem(
        lambda fast, slow, s: G(join(fast), slow["x"], s, quartic),
        lambda fast, slow, q: F(join(fast), slow["x"], q),
        init,
    )


OUTER = {"x": X}


def leaf(x):
    return x.detach().clone().requires_grad_()


def descent(y, x, s, steps=STEPS, lr=LR, loss=G):
    """All iterates, with their graph."""
    path = [y]
    for _ in range(steps):
        (g,) = grad(loss(path[-1], x, s), path[-1], create_graph=True)
        path.append(path[-1] - lr * g)
    return path


def still(y, x, s, **kwargs):
    return descent(leaf(y), x.detach(), s, **kwargs)[-1].detach()


@pytest.fixture(scope="module")
def boat():
    names = {"torch": torch, "mf": mf, "__name__": "boat"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def check(meta, outer, episodes, want, rtol=1e-9):
    """The hypergradient of each task by backward, and of the mean over tasks by vmap."""
    tasks = len(want)
    for i in range(tasks):
        leaves = {k: leaf(v) for k, v in outer.items()}
        loss, _ = meta(leaves, torch.utils._pytree.tree_map(lambda v: v[i], episodes))  # noqa: B023
        loss.backward()
        for k in want[i]:
            torch.testing.assert_close(leaves[k].grad, want[i][k], rtol=rtol, atol=1e-12)
    grads = torch.func.grad(lambda o: mf.over_tasks(meta)(o, episodes)[0])(outer)
    for k in want[0]:
        mean = torch.stack([w[k] for w in want]).mean(0)
        torch.testing.assert_close(grads[k], mean, rtol=rtol, atol=1e-12)


def oracle(at, outer=("x",)):
    """`d F(at(leaf x, s, q)) / dx` for each task."""
    want = []
    for s, q in zip(S, Q, strict=True):
        x = leaf(X)
        want.append({"x": grad(F(at(x, s, q), x, q), x)[0]})
    return want


EPISODES = mf.Episode(S, Q)
BOTH = mf.Episode(EPISODES, Q)
SGD = mf.SGD(LR, STEPS)


def implicit(x, s, q, y, inverse):
    """`F_x - G_xy inverse(G_yy) F_y`."""
    y, x = leaf(y), leaf(x)
    g = grad(G(y, x, s), y, create_graph=True)[0]
    hessian = torch.stack([grad(g[i], y, retain_graph=True)[0] for i in range(5)])
    direct, v = grad(F(y, x, q), (x, y))
    return direct - grad(g, x, inverse(hessian, v))[0]


def test_page_names_every_operation():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if "|" in line]
    assert [row for row in rows if row.isupper()] == OPERATIONS


# --- gradient mapping --------------------------------------------------------------------------


def test_ngd_and_rad(boat):
    want = oracle(lambda x, s, q: descent(leaf(Y0), x, s)[-1])
    check(mf.bilevel(problem(), solver=SGD, estimator=boat["na_op"]["RAD"]), OUTER, EPISODES, want)


@pytest.mark.parametrize("recompute", [False, True])
def test_gda(boat, recompute):
    def at(x, s, q):
        y, alpha = leaf(Y0), 0.5
        for _ in range(STEPS):
            loss = alpha * F(y, x, q) + (1 - alpha) * G(y, x, s)
            y, alpha = y - LR * grad(loss, y, create_graph=True)[0], 0.9 * alpha
        return y

    aggregated = boat["gda"](problem(), 0.5 * 0.9 ** torch.arange(STEPS, dtype=F64))
    meta = mf.bilevel(aggregated, solver=SGD, estimator=mf.Unrolled(recompute=recompute))
    check(meta, OUTER, BOTH, oracle(at))


def test_di():
    """Closed form on a quadratic: `dF / d y_0 = (I - lr H)^K F_y(y_K)`, beside that of `x`."""
    power = torch.linalg.matrix_power(torch.eye(5, dtype=F64) - LR * H, STEPS)
    want = []
    for s, q in zip(S, Q, strict=True):
        best = torch.linalg.solve(H, B @ X + s)
        y = best + power @ (Y0 - best)
        slope = y - q + (C @ X).sin()
        direct = C.T @ (y * (C @ X).cos()) + 3 * X**2
        through = B.T @ torch.linalg.solve(H, (torch.eye(5, dtype=F64) - power) @ slope)
        want.append({**split(power @ slope), "x": direct + through})
    learned = problem(lambda slow, support: {k: slow[k] for k in ("a", "b.c")}, quartic=0.0)
    meta = mf.bilevel(learned, solver=SGD, estimator=mf.Unrolled())
    check(meta, {**OUTER, **split(Y0)}, EPISODES, want)


@pytest.mark.parametrize("averaged", [False, True])
def test_dm(averaged):
    """Four steps of y, v and x with falling rates; with averaging, a falling weight as well."""
    s, q = S[0], Q[0]
    alphas = [0.6 / (k + 1) if averaged else 0.0 for k in range(4)]

    def mixed(fast, slow, data):
        s, q, alpha = data
        y, x = join(fast), slow["x"]
        return alpha * F(y, x, q) + (1 - alpha) * G(y, x, s)

    mean = replace(problem(), inner_loss=mixed)
    soba = mf.algorithms.SOBA(mean, inner_lr=LR, v_lr=0.2)
    outer = dict(OUTER)
    state = soba.init(outer)
    x, y, v = X, Y0, torch.zeros(5, dtype=F64)
    for k, alpha in enumerate(alphas):
        rate = 1 / (k + 1)
        lx, ly = leaf(x), leaf(y)
        psi = alpha * F(ly, lx, q) + (1 - alpha) * G(ly, lx, s)
        slope = grad(psi, ly, create_graph=True)[0]
        curved, cross = grad(slope, (ly, lx), v)
        pull, direct = grad(F(ly, lx, q), (ly, lx))
        want = direct - cross
        y, v = y - LR * rate * slope.detach(), v - 0.2 * rate * (curved - pull)
        x = x - 0.05 * want

        now = replace(soba, inner_lr=LR * rate, v_lr=0.2 * rate)
        data = mf.Episode((s, q, torch.tensor(alpha, dtype=F64)), q)
        grads, state, _ = now.step(outer, state, data)
        outer = {"x": outer["x"] - 0.05 * grads["x"]}
        torch.testing.assert_close(grads["x"], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(join(state.fast), y, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(join(state.v), -v, rtol=1e-9, atol=1e-12)


def test_dm_with_line_search():
    """BOAT's DM with CG: one steepest-descent step on `H v = F_y`, its length exact."""
    y, v = leaf(Y0), 0.3 * C @ X
    slope = grad(G(y, X, S[0]), y, create_graph=True)[0]
    hessian = torch.stack([grad(slope[i], y, retain_graph=True)[0] for i in range(5)])
    pull = grad(F(y, X, Q[0]), y)[0]
    r = pull - hessian @ v
    solve = mf.WarmStart(mf.CG(1), split(v))
    got = mf.adjoint(problem(), OUTER, split(Y0), S[0], split(pull), solve=solve)
    torch.testing.assert_close(join(got), v + (r @ r) / (r @ hessian @ r) * r, rtol=1e-9, atol=0)


# --- numerical approximation -------------------------------------------------------------------


def test_rgt(boat):
    def at(x, s, q):
        return descent(leaf(still(Y0, x, s, steps=STEPS - 2)), x, s, steps=2)[-1]

    meta = mf.bilevel(problem(), solver=SGD, estimator=boat["na_op"]["RGT"])
    check(meta, OUTER, EPISODES, oracle(at))


def test_ptt(boat):
    """Queries at three places make the worst iterate differ from task to task."""
    seen = mf.Episode(S, torch.stack([Q[0], Y0 - 5 * S[1], 3 * Q[2] - S[2]]))
    picked, want = [], []
    for s, q in zip(*seen, strict=True):
        x = leaf(X)
        values = [F(y, x, q) for y in descent(leaf(Y0), x, s)[1:]]
        picked.append(max(range(STEPS), key=lambda k: values[k].item()))
        want.append({"x": grad(values[picked[-1]], x)[0]})
    assert len(set(picked)) > 1
    sees = replace(
        problem(), inner_loss=lambda fast, slow, both: G(join(fast), slow["x"], both.support)
    )
    meta = mf.bilevel(sees, solver=SGD, estimator=boat["ptt"](sees.outer_loss))
    check(meta, OUTER, mf.Episode(seen, seen.query), want)


LONG = mf.SGD(LR, 60)


def conjugate(hessian, v, steps=3):
    x, r = torch.zeros_like(v), v
    p = r
    for _ in range(steps):
        step = (r @ r) / (p @ hessian @ p)
        x, new = x + step * p, r - step * (hessian @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


def series(hessian, v, products=10):
    term = total = v
    for _ in range(products):
        term = term - 0.3 * hessian @ term
        total = total + term
    return 0.3 * total


@pytest.mark.parametrize("name, inverse", [("CG", conjugate), ("NS", series)])
def test_cg_and_ns(boat, name, inverse):
    """Both sides stop early: three steps, eleven terms of scale 0.3 (the page's lr)."""
    want = [
        {"x": implicit(X, s, q, still(Y0, X, s, steps=60), inverse)}
        for s, q in zip(S, Q, strict=True)
    ]
    meta = mf.bilevel(problem(), solver=LONG, estimator=boat["na_op"][name])
    # 60 inner steps and a series in which |I - 0.3 H| > 1 amplify roundings more than elsewhere.
    check(meta, OUTER, EPISODES, want, rtol=1e-8)


def test_iad():
    """MAML: the outer loss knows the start only through the inner loop."""
    maml = mf.Problem(
        lambda fast, slow, s: G(join(fast), X, s),
        lambda fast, slow, q: F(join(fast), X, q),
        init=mf.from_slow,
    )
    want = []
    for s, q in zip(S, Q, strict=True):
        y = leaf(Y0)
        want.append(split(grad(F(descent(y, X, s)[-1], X, q), y)[0]))
    meta = mf.bilevel(maml, solver=SGD, estimator=mf.Unrolled())
    check(meta, split(Y0), EPISODES, want)


def test_fd(boat):
    """DARTS: central differences of `G_x` at `y_0 +- eps F_y / |F_y|`, for the same eps.

    Roundings of 1e-15 are divided by 2 eps = 0.02: rtol 1e-9 has room.
    """
    want = []
    for s, q in zip(S, Q, strict=True):
        x, y = leaf(X), leaf(still(Y0, X, s, steps=1))
        direct, v = grad(F(y, x, q), (x, y))
        eps = 0.01 / v.norm()
        ahead, behind = (grad(G(Y0 + e * v, x, s), x)[0] for e in (eps, -eps))
        want.append({"x": direct - LR * (ahead - behind) / (2 * eps)})
    meta = mf.bilevel(problem(), solver=mf.SGD(LR, 1), estimator=boat["na_op"]["FD"])
    check(meta, OUTER, EPISODES, want)


def test_iga(boat):
    want = []
    for s, q in zip(S, Q, strict=True):
        x, y = leaf(X), leaf(still(Y0, X, s))
        g_y, g_x = grad(G(y, x, s), (y, x))
        f_y, f_x = grad(F(y, x, q), (y, x))
        want.append({"x": f_x - (f_y @ g_y) / (g_y @ g_y) * g_x})
    check(mf.bilevel(problem(), solver=SGD, estimator=boat["iga"]), OUTER, EPISODES, want)


def test_foa(boat):
    """Inner gradients as constants: `F_x` by x and `F_y` by the start."""
    want = []
    for s, q in zip(S, Q, strict=True):
        x, y = leaf(X), leaf(still(Y0, X, s))
        f_x, f_y = grad(F(y, x, q), (x, y))
        want.append({"x": f_x, **split(f_y)})
    learned = problem(lambda slow, support: {k: slow[k] for k in ("a", "b.c")})
    meta = mf.bilevel(learned, solver=SGD, estimator=boat["na_op"]["FOA"])
    check(meta, {**OUTER, **split(Y0)}, EPISODES, want)


# --- first order -------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxed", [False, True])
def test_vso(boat, relaxed):
    mu, theta, tau, lr = 0.3, 0.05, 0.5, 0.01

    def ridge(y, x, s):
        return G(y, x, s) + mu * y @ y

    want = []
    for s, q in zip(S, Q, strict=True):
        x = leaf(X)
        z = still(Y0, X, s, loss=ridge)
        y = z
        for _ in range(8):
            leaf_y = leaf(y)
            now = G(leaf_y, X, s)
            gap = ridge(z, X, s) - now + (now.item() if relaxed else 0)
            loss = F(leaf_y, X, q) - tau * gap.log() + theta * leaf_y @ leaf_y
            y = y - lr * grad(loss, leaf_y)[0]
        gap = ridge(z, x, s).item() - (0 if relaxed else G(y, x, s).item())
        assert gap > 0
        f_x, at_z, at_y = (grad(v, x)[0] for v in (F(y, x, q), G(z, x, s), G(y, x, s)))
        want.append({"x": f_x - tau * (at_z - at_y) / gap})
    barrier = boat["vso"](problem(), SGD, mu=mu, theta=theta, tau=tau, relaxed=relaxed)
    meta = mf.bilevel(barrier, solver=mf.SGD(lr, 8), estimator=mf.FirstOrder())
    check(meta, OUTER, EPISODES, want)


def stepped(step, state, wants):
    """One step for each task by a loop, and for all by vmap: gradients and first state."""
    for i in range(TASKS):
        grads, fast = step(OUTER, state, mf.Episode(S[i], Q[i]))
        torch.testing.assert_close(grads["x"], wants[i][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(join(fast), wants[i][1], rtol=1e-9, atol=1e-12)
    grads, fast = torch.func.vmap(lambda e: step(OUTER, state, e))(EPISODES)
    for i in range(TASKS):
        one = {k: v[i] for k, v in fast.items()}
        torch.testing.assert_close(grads["x"][i], wants[i][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(join(one), wants[i][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["eta |grad q|^2", "u1 q"])
def test_vfo(kind):
    """The direction of BOME by both of its barriers; the second as `replace(bome, eta=...)`."""
    wants, etas = [], []
    for s, q in zip(S, Q, strict=True):
        x, y, best = leaf(X), leaf(Y0), still(Y0, X, s, steps=10)
        value = G(y, x, s) - G(best, x, s)
        by_y, by_x = grad(value, (y, x))
        f_y, f_x = grad(F(y, x, q), (y, x))
        square = by_y @ by_y + by_x @ by_x
        barrier = 0.5 * square if kind[0] == "e" else 40.0 * value.detach()
        weight = ((barrier - f_y @ by_y - f_x @ by_x) / square).clamp(min=0)
        assert weight > 0
        etas.append((barrier / square).item())
        wants.append((f_x + weight * by_x, Y0 - 0.05 * (f_y + weight * by_y)))
    bome = mf.algorithms.BOME(problem(), inner_lr=LR, fast_lr=0.05, eta=0.5, inner_steps=10)
    state = bome.init(OUTER)
    if kind[0] == "e":

        def step(outer, state, episode):
            grads, after, _ = bome.step(outer, state, episode)
            return grads, after.fast

        return stepped(step, state, wants)
    for i, eta in enumerate(etas):
        now = replace(bome, eta=eta)
        grads, after, _ = now.step(OUTER, state, mf.Episode(S[i], Q[i]))
        torch.testing.assert_close(grads["x"], wants[i][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(join(after.fast), wants[i][1], rtol=1e-9, atol=1e-12)


def test_meso(boat):
    """From a `theta` apart from `y`, so that the pull between them is not zero."""
    ck, eta, rate, gamma = 1.7, 0.05, 0.04, 0.6
    theta = Y0 + 0.5 * C @ X
    wants = []
    for s, q in zip(S, Q, strict=True):
        x, t, y = leaf(X), leaf(theta), leaf(Y0)
        new = theta - eta * (grad(G(t, X, s), t)[0] + gamma * (theta - Y0))
        loss = F(y, X, q) / ck + G(y, X, s) - 0.5 * gamma * ((y - new) ** 2).sum()
        after = Y0 - rate * grad(loss, y)[0]
        value = F(after, x, q) / ck + G(after, x, s) - G(new, x, s)
        wants.append((grad(value, x)[0], after))

    def step(outer, state, episode):
        settings = {"strength": ck, "theta_lr": eta, "fast_lr": rate, "pull": gamma}
        grads, (fast, _) = boat["meso"](problem(), outer, state, episode, **settings)
        return grads, fast

    stepped(step, (split(Y0), split(theta)), wants)


def test_pgdo(boat):
    gamma, rate = 3.0, 0.02
    best0 = Y0 + 0.5 * C @ X
    wants = []
    for s, q in zip(S, Q, strict=True):
        x, y, best = leaf(X), leaf(Y0), still(best0, X, s)
        loss = F(y, x, q) + gamma * (G(y, x, s) - G(best, x, s))
        by_y, by_x = grad(loss, (y, x))
        wants.append((by_x, Y0 - rate * by_y))

    def step(outer, state, episode):
        settings = {"strength": gamma, "solver": SGD, "fast_lr": rate}
        grads, (fast, _) = boat["pgdo"](problem(), outer, state, episode, **settings)
        return grads, fast

    stepped(step, (split(Y0), split(best0)), wants)


def test_pgdo_and_f2sa_share_their_limit(boat):
    """Where both inner problems are solved, the order of the updates no longer matters."""
    episode, strength = mf.Episode(S[0], Q[0]), 3.0
    f2sa = mf.algorithms.F2SA(problem(), inner_lr=LR, strength=strength, inner_steps=400)
    want, state, _ = f2sa.step(OUTER, f2sa.init(OUTER), episode)
    settings = {"strength": strength, "solver": mf.SGD(LR, 400), "fast_lr": LR / strength}
    got, _ = boat["pgdo"](problem(), OUTER, (state.nudged, state.fast), episode, **settings)
    torch.testing.assert_close(got["x"], want["x"], rtol=1e-9, atol=1e-12)


def test_gaffo(boat):
    gap, sigma = 0.7, 0.05
    maml = mf.Problem(
        lambda fast, slow, s: G(join(fast), X, s),
        lambda fast, slow, q: F(join(fast), X, q),
        init=mf.from_slow,
    )
    want = []
    for s, q in zip(S, Q, strict=True):
        y = leaf(still(Y0, X, s, steps=1))
        base, risk = grad(G(y, X, s), y)[0], grad(F(y, X, q), y)[0]
        moved = leaf(y + sigma * base)
        want.append(split(risk / gap - (grad(G(moved, X, s), moved)[0] - base)))
    loss = boat["gaffo"](maml, gap=gap, sigma=sigma)
    meta = mf.bilevel(loss, solver=mf.SGD(LR, 1), estimator=mf.FirstOrder())
    check(meta, split(Y0), mf.Episode(S, EPISODES), want)


def test_alto():
    """Three alternations of one inner step and one outer step on `F_x`."""
    x, y, outer, fast = X, Y0, dict(OUTER), split(Y0)
    warm = problem(lambda slow, support: fast)
    meta = mf.bilevel(warm, solver=mf.SGD(LR, 1), estimator=mf.FirstOrder())
    for _ in range(3):
        y = still(y, x, S[0], steps=1)
        lx = leaf(x)
        want = grad(F(y, lx, Q[0]), lx)[0]
        x = x - 0.05 * want
        grads, (_, aux) = mf.hypergrad(meta)(outer, mf.Episode(S[0], Q[0]))
        outer, fast = {"x": outer["x"] - 0.05 * grads["x"]}, aux.params
        torch.testing.assert_close(grads["x"], want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(join(fast), y, rtol=1e-9, atol=1e-12)
