"""The mean over tasks, the recipes of problems, the comparison, the compiled graph."""

from __future__ import annotations

import torch
from outputs.networks import episodes, first, loss, normal, penalties, plain, weights
from outputs.versions import problem

import metafocus as mf


def tasks(**how):
    """The mean over tasks, by hypergrad, by backward, and wrapped in a function of one's own."""

    def run(dtype):
        meta = mf.over_tasks(
            mf.bilevel(problem(loss, loss), solver=mf.SGD(0.1, steps=3), estimator=mf.Unrolled()),
            **how,
        )
        outer, many = weights(dtype), episodes(dtype)
        grads, (value, aux) = mf.hypergrad(meta)(outer, many)
        wrapped, _ = mf.hypergrad(lambda o, e: meta(o, e))(outer, many)
        leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
        loss_, _ = meta(leaves, many)
        loss_.backward()
        return {
            "hypergrad": {"loss": value, "grads": grads},
            "aux": {"inner": aux.inner_losses, "adapted": aux.params},
            "wrapped": wrapped,
            "backward": {"loss": loss_, "grads": {k: v.grad for k, v in leaves.items()}},
            "grad": torch.func.grad(meta, has_aux=True)(outer, many)[0],
        }

    return run


def traced(dtype):
    """The hypergradient over tasks as one graph, run without a compiler."""
    estimator = mf.Unrolled(recompute=True)
    meta = mf.bilevel(problem(loss, loss), solver=mf.SGD(0.1, steps=3), estimator=estimator)
    run = mf.compiled(mf.hypergrad(mf.over_tasks(meta)), backend="eager")
    return [run(weights(dtype), episodes(dtype))[0] for _ in range(2)]


def penalised(dtype):
    """The decay of each weight, learned by four outer steps of implicit differentiation."""
    start = weights(dtype)
    posed = mf.recipes.hpo.log_l2(plain, lambda: start)
    estimator = mf.Implicit(mf.CG(5))
    meta = mf.bilevel(posed, solver=mf.SGD(0.2, steps=30), estimator=estimator)
    outer = penalties(dtype)
    for _ in range(4):
        grads, (value, _) = mf.hypergrad(meta)(outer, first(episodes(dtype)))
        outer = {k: v - 0.5 * grads[k] for k, v in outer.items()}
    return {"loss": value, "outer": outer}


def reweighted(dtype):
    def each(params, data):
        x, y = data
        h = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
        return ((h @ params["2.weight"].T + params["2.bias"] - y) ** 2).mean(-1)

    posed = mf.recipes.hpo.reweight(each, lambda: weights(dtype), l2=0.1)
    support, query = first(episodes(dtype))
    episode = mf.Episode((torch.arange(8) % 3, support), query)
    estimator = mf.Unrolled(recompute=True)
    meta = mf.bilevel(posed, solver=mf.SGD(0.2, steps=6), estimator=estimator)
    return mf.hypergrad(meta)({"weight": normal(dtype, 5, 3)}, episode)[0]


def distilled(dtype):
    posed = mf.recipes.hpo.distill(plain, lambda: weights(dtype), normal(dtype, 6, 4, 2))
    meta = mf.bilevel(posed, solver=mf.SGD(0.2, steps=6), estimator=mf.Unrolled())
    return mf.hypergrad(meta)({"x": normal(dtype, 7, 4, 3)}, first(episodes(dtype)))[0]


def fewshot(make, outer=weights, **settings):
    def run(dtype):
        settings_ = {"solver": mf.SGD(0.1, steps=3), "estimator": mf.Unrolled(), **settings}
        meta = mf.over_tasks(mf.bilevel(make(), **settings_))
        return mf.hypergrad(meta)(outer(dtype), episodes(dtype))[0]

    return run


RECIPES = mf.recipes.fewshot


def comparison(dtype):
    """The rows of a comparison, without times and memory."""
    table = mf.compare(
        problem(mf.proximal(loss, 1.7), loss),
        weights(dtype),
        first(episodes(dtype)),
        solver=mf.SGD(0.2, steps=12),
        estimators={
            "full": mf.Unrolled(),
            "first order": mf.FirstOrder(),
            "implicit": mf.Implicit(mf.CG(4)),
            "penalty": mf.Penalty(50.0),
        },
        reference="full",
        repeats=1,
    )
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")}
            for row in table.rows]  # fmt: skip
    return {row.pop("name"): row for row in rows}


OUTPUTS = {
    "over tasks, vmap": tasks(),
    "over tasks, loop": tasks(how="loop"),
    "over tasks, chunks of 2": tasks(chunk_size=2),
    "compiled, eager back end": traced,
    "recipe, maml": fewshot(lambda: RECIPES.maml(plain)),
    "recipe, anil": fewshot(lambda: RECIPES.anil(plain, ("2.weight", "2.bias"))),
    "recipe, meta-sgd": fewshot(
        lambda: RECIPES.meta_sgd(plain),
        lambda dtype: RECIPES.with_rates(weights(dtype), 0.1),
        solver=mf.SGD(RECIPES.learned_rates, steps=3),
    ),
    "recipe, imaml": fewshot(
        lambda: RECIPES.imaml(plain, 1.7),
        solver=mf.SGD(0.2, steps=20),
        estimator=mf.Implicit(mf.CG(4)),
    ),
    "recipe, reptile": fewshot(lambda: RECIPES.reptile(plain), estimator=mf.FirstOrder()),
    "recipe, log_l2": penalised,
    "recipe, reweight": reweighted,
    "recipe, distill": distilled,
    "compare": comparison,
}
