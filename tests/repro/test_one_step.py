"""Published claims about cheap hypergradients in closed form (T34, T35, T37) and MAML++ (T39)."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error

import metafocus as mf

pytestmark = [pytest.mark.repro]
F64 = torch.float64
CURVATURE = torch.tensor([0.2, 1.0, 4.0], dtype=F64)


def quadratic(curvature):
    """Inner: a quadratic around `slow["c"]`; outer: the distance of the solution from one."""

    def inner(fast, slow, data):
        return (curvature * (fast["x"] - slow["c"]) ** 2).sum() / 2

    def outer(fast, slow, data):
        return ((fast["x"] - 1) ** 2).sum() / 2

    return mf.Problem(inner, outer, lambda slow, _: {"x": slow["c"].detach().clone()})


def gradient(problem, solver, estimator, c):
    meta = mf.bilevel(problem, solver=solver, estimator=estimator)
    return mf.hypergrad(meta)({"c": c}, mf.Episode(None, None))[0]["c"]


C = torch.tensor([3.0, -2.0, 0.5], dtype=F64)


@pytest.mark.claim(
    "T34",
    paper="Liu et al., DARTS, arXiv 1806.09055, equation 7; Bi et al., arXiv 1910.11831",
    says="the one-step gradient of DARTS has the sign of the implicit one and the wrong size: each "
    "direction is scaled by the rate times its curvature",
    published="qualitative: the bias makes the search unstable",
)
def test_t34_the_one_step_gradient_is_scaled_by_rate_times_curvature(claim):
    """T34. A ridge problem at its inner optimum, where everything has a closed form.

    Tolerance 1e-12: rounding.
    """
    problem, rate = quadratic(CURVATURE), 0.1
    one = gradient(problem, mf.SGD(rate, 1), mf.Unrolled(), C)
    implicit = gradient(problem, mf.SGD(rate, 1), mf.Implicit(mf.CG(3)), C)
    ratio = one / implicit
    claim({"ratio": ratio.tolist(), "rate times curvature": (rate * CURVATURE).tolist()})
    assert relative_error(ratio, rate * CURVATURE) < 1e-12


@pytest.mark.claim(
    "T35",
    paper="Choe et al., SAMA, arXiv 2310.05674, section 3",
    says="an identity in place of the inverse Hessian is exact only if the Hessian is a multiple "
    "of it; the step of an adaptive optimiser belongs in front of it",
    published="derivation",
)
def test_t35_identity_inverse_and_adaptation(claim):
    """T35. Two Hessians; and one step of Adam against `M' D v` with `D = d update / d gradient`.

    Tolerance 1e-12 where it is exact.
    """
    same, other = torch.full((3,), 2.0, dtype=F64), CURVATURE
    errors = {}
    for name, curvature in (("multiple of the identity", same), ("other", other)):
        problem = quadratic(curvature)
        exact = gradient(problem, mf.SGD(0.1, 1), mf.Implicit(mf.CG(3)), C)
        identity = mf.Implicit(mf.Identity(1 / curvature.mean().item()))
        errors[name] = relative_error(gradient(problem, mf.SGD(0.1, 1), identity, C), exact)

    # A step of Adam from a point that is not the optimum, by the formula.
    rate, eps = 0.1, 1e-8
    away = torch.tensor([0.3, -0.4, 0.7], dtype=F64)
    inner = quadratic(other)
    problem = mf.Problem(inner.inner_loss, inner.outer_loss, lambda slow, _: {"x": C + away})
    got = gradient(problem, mf.Adam(rate, 1, eps=eps), mf.Unrolled(), C)
    g = (other * away).requires_grad_()
    # First step: both bias corrections cancel the decay.
    update = -rate * g / ((g**2).sqrt() + eps)
    (d,) = torch.autograd.grad(update.sum(), g)
    want = -other * d * (C + away + update.detach() - 1)
    errors["one step of Adam"] = relative_error(got, want)
    claim(errors)
    assert errors["multiple of the identity"] < 1e-12
    assert errors["other"] > 0.3
    # d is a difference of nearly equal numbers, of relative size eps / |g|.
    assert errors["one step of Adam"] < 1e-6


@pytest.mark.claim(
    "T37",
    paper="Nichol et al., Reptile, arXiv 1803.02999, section 5.1",
    says="MAML, its first-order form and Reptile are AvgGrad minus 2, 1 and 1 times the rate times "
    "AvgGradInner (Reptile: of 2 AvgGrad), up to the square of the rate",
    published="equations 15 to 17",
)
def test_t37_expansion_into_avg_grad_and_avg_grad_inner(claim):
    """T37. Two minibatches in both orders; the residual falls as the square of the rate.

    Tolerance: halving the rate divides the residual by 4, within 5 % at a rate of 1e-3.
    """
    g = torch.Generator().manual_seed(0)
    point = torch.randn(4, generator=g, dtype=F64)
    batches = [torch.randn(5, 4, generator=g, dtype=F64) for _ in range(2)]

    def loss(fast, slow, x):
        return torch.tanh(x @ fast["w"]).square().sum() + (x @ fast["w"]).exp().mean()

    def of(b):
        def alone(w):
            return loss({"w": w}, {}, batches[b])

        return torch.func.grad(alone)(point), torch.func.hessian(alone)(point)

    (g0, h0), (g1, h1) = of(0), of(1)
    average, inner = (g0 + g1) / 2, (h1 @ g0 + h0 @ g1) / 2

    def method(name, rate):
        total = torch.zeros_like(point)
        for first, second in ((0, 1), (1, 0)):
            if name == "Reptile":
                stream = mf.PerStep(torch.stack([batches[first], batches[second]]))
                problem = mf.Problem(loss, loss)
                found = mf.adapt(problem, {"w": point}, stream, solver=mf.SGD(rate, 2))
                total += (point - found.params["w"]) / rate
            else:
                how = mf.Unrolled() if name == "MAML" else mf.FirstOrder()
                meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(rate, 1), estimator=how)
                episode = mf.Episode(batches[first], batches[second])
                total += mf.hypergrad(meta)({"w": point}, episode)[0]["w"]
        return total / 2

    orders = {}
    for name, whole, part in (("MAML", 1, 2), ("FOMAML", 1, 1), ("Reptile", 2, 1)):
        left = [
            (method(name, rate) - (whole * average - part * rate * inner)).norm()
            for rate in (1e-3, 5e-4)
        ]
        orders[name] = (left[0] / left[1]).log2().item()
    claim({"order of the residual": orders})
    assert all(abs(order - 2) < 0.05 for order in orders.values())


@pytest.mark.claim(
    "T39",
    paper="Antoniou et al., MAML++, arXiv 1810.09502, section 4",
    says="the multi-step loss stabilises MAML: the spread over seeds falls",
    published="figure 1: one of three seeds of MAML diverges, none of MAML++",
    note="not reproduced: the spread was first asserted at an inner rate of 0.1, where it rises; "
    "at larger rates both forms diverge",
    asserted=False,
)
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_t39_the_multi_step_loss_stabilises(rate, claim):
    """T39. Sinusoids, five inner steps, seeds trained side by side by `vmap`.

    The claim is not reproduced. It was first asserted at a rate of 0.1, and the assertion failed.
    Two larger rates were tried then, and the claim has been reported without an assertion since.
    Measured here, 8 seeds and 250 steps, as standard deviation over seeds and mean of the log
    loss, from the last step's loss to the multi-step loss:

    * rate 0.1: 0.29 to 0.33, and 1.33 to 1.29;
    * rate 0.2: 1.48 to 1.84, and 9.4 to 9.1, which is divergence;
    * rate 0.4: 1.99 to 1.69, and 17.8 to 17.7, where no form trains anything.
    """
    seeds, steps = (12, 600) if claim.full else (8, 250)
    inner_steps, hidden = 5, 24

    def loss(fast, slow, data):
        x, y = data
        h = torch.tanh(x @ fast["w1"] + fast["b1"])
        h = torch.tanh(h @ fast["w2"] + fast["b2"])
        return ((h @ fast["w3"] - y) ** 2).mean()

    def run(path):
        g = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(seeds, *shape, generator=g)

        outer = {
            "w1": randn(1, hidden),
            "b1": randn(hidden),
            "w2": randn(hidden, hidden) / hidden**0.5,
            "b2": 0 * randn(hidden),
            "w3": randn(hidden, 1) / hidden**0.5,
        }
        meta = mf.bilevel(
            mf.Problem(loss, loss),
            solver=mf.SGD(rate, inner_steps),
            estimator=mf.Unrolled(),
            path=path,
        )
        one = mf.over_tasks(meta)
        leaves = {k: v.requires_grad_() for k, v in outer.items()}
        optimizer = torch.optim.Adam(leaves.values(), 3e-3)
        tail = []
        for step in range(steps):
            size = (seeds, 8, 1, 1)
            amplitude = 0.1 + 4.9 * torch.rand(size, generator=g)
            phase = 3.14159 * torch.rand(size, generator=g)
            x = 10 * torch.rand(seeds, 8, 20, 1, generator=g) - 5
            y = amplitude * torch.sin(x + phase)
            episodes = mf.Episode((x[:, :, :10], y[:, :, :10]), (x[:, :, 10:], y[:, :, 10:]))

            def of_seed(o, e):
                return one(o, e)[0]

            value = torch.func.vmap(of_seed)(leaves, episodes)
            last = torch.func.vmap(
                lambda o, e: torch.func.vmap(
                    lambda o, e: loss(
                        mf.adapt(
                            mf.Problem(loss, loss), o, e.support, solver=mf.SGD(rate, inner_steps)
                        ).params,
                        o,
                        e.query,
                    ),
                    in_dims=(None, 0),
                )(o, e).mean()
            )({k: v.detach() for k, v in leaves.items()}, episodes)
            optimizer.zero_grad()
            value.sum().backward()
            optimizer.step()
            if step >= steps * 3 // 4:
                tail.append(last.detach())
        return torch.stack(tail).log().mean(0)

    plain, multi = run(None), run([0.1, 0.1, 0.1, 0.1, 0.6])
    claim(
        {
            "spread, last step": plain.std(),
            "spread, multi-step": multi.std(),
            "mean, last step": plain.mean(),
            "mean, multi-step": multi.mean(),
        }
    )
    assert multi.isfinite().all() and plain.isfinite().all()
