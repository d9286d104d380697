"""W4: implicit gradient of 64 regularisation strengths, logistic regression on digits, CG 20.

The solution is given to all, so only the hypergradient is measured.

python benchmarks/implicit_digits.py --hypertorch PATH --output FILE.json

PATH is a checkout of github.com/prolearner/hypertorch; without it that row is left out.
"""

from __future__ import annotations

import sys

import torch
from harness import main

import metafocus as mf

STEPS = 20


def contenders(args):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(pixels, dtype=torch.float64) / 16
    labels = torch.as_tensor(labels)
    # float64 for the check and for the times: CG needs it here, the condition number is 600.
    train, test = (pixels[:900], labels[:900]), (pixels[900:], labels[900:])
    outer = {"log_l2": torch.full((64,), -4.0, dtype=torch.float64)}

    def inner(fast, slow, data):
        x, y = data
        fit = torch.nn.functional.cross_entropy(x @ fast["w"], y)
        return fit + 0.5 * (slow["log_l2"].exp()[:, None] * fast["w"] ** 2).sum()

    def validation(fast, slow, data):
        x, y = data
        return torch.nn.functional.cross_entropy(x @ fast["w"], y)

    solution = _solve(lambda w: inner({"w": w}, outer, train))

    problem = mf.Problem(inner, validation, init=lambda slow: {"w": solution})
    meta = mf.bilevel(
        problem,
        solver=mf.Given(lambda slow, support: {"w": solution}),
        estimator=mf.Implicit(mf.CG(STEPS)),
    )
    gradient = mf.hypergrad(meta)
    dense = mf.hypergrad(
        mf.bilevel(
            problem,
            solver=mf.Given(lambda slow, support: {"w": solution}),
            estimator=mf.Implicit(mf.Dense()),
        )
    )
    episode = mf.Episode(train, test)

    def by_hand():
        w = solution.clone().requires_grad_()
        reg = outer["log_l2"].clone().requires_grad_()
        value = inner({"w": w}, {"log_l2": reg}, train)
        (g,) = torch.autograd.grad(value, w, create_graph=True)
        (b,) = torch.autograd.grad(validation({"w": w}, None, test), w)
        x, r, p = torch.zeros_like(b), b, b
        rr = (r * r).sum()
        for _ in range(STEPS):
            (hp,) = torch.autograd.grad(g, w, p, retain_graph=True)
            alpha = rr / (p * hp).sum()
            x, r = x + alpha * p, r - alpha * hp
            new = (r * r).sum()
            p, rr = r + new / rr * p, new
        return -torch.autograd.grad(g, reg, x)[0]

    found = {
        "torch.autograd by hand": by_hand,
        "metafocus Implicit(CG(20))": lambda: gradient(outer, episode)[0]["log_l2"],
        "exact (dense)": lambda: dense(outer, episode)[0]["log_l2"],
    }
    if args.hypertorch:
        sys.path.insert(0, args.hypertorch)
        import hypergrad

        def with_hypertorch():
            reg = outer["log_l2"].clone().requires_grad_()

            def step(params, hparams):
                value = inner({"w": params[0]}, {"log_l2": hparams[0]}, train)
                (g,) = torch.autograd.grad(value, params, create_graph=True)
                return [params[0] - g]

            def outer_loss(params, hparams):
                return validation({"w": params[0]}, None, test)

            return hypergrad.CG([solution], [reg], STEPS, step, outer_loss, set_grad=False)[0]

        found["hypertorch CG"] = with_hypertorch
    return found


def _solve(loss):
    w = torch.zeros(64, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()


if __name__ == "__main__":
    main(
        __file__,
        contenders,
        reference="torch.autograd by hand",
        tolerance=1e-2,  # CG 20 itself is off by 8e-3 at this condition number
        options=lambda parser: parser.add_argument("--hypertorch"),
    )
