"""The estimators that differentiate steps, and every way to ask one for its derivative."""

from __future__ import annotations

import functools

import torch
from problems import Quadratic, grads_of

import metafocus as mf

STEPS = 4

UNROLLED = {
    "FirstOrder": (mf.FirstOrder(), 0),
    "graph": (mf.Unrolled(), None),
    "last=0": (mf.Unrolled(last=0), 0),
    "last=1": (mf.Unrolled(last=1), 1),
    "last=2": (mf.Unrolled(last=2), 2),
    "last=K": (mf.Unrolled(last=STEPS), STEPS),
    "last>K": (mf.Unrolled(last=STEPS + 3), STEPS + 3),
    "recompute": (mf.Unrolled(recompute=True), None),
    "recompute=2": (mf.Unrolled(recompute=2), None),
    "recompute=3": (mf.Unrolled(recompute=3), None),
    "recompute>K": (mf.Unrolled(recompute=STEPS + 5), None),
    "last=2,recompute": (mf.Unrolled(last=2, recompute=True), 2),
    "last=3,recompute=2": (mf.Unrolled(last=3, recompute=2), 3),
    "last=0,recompute": (mf.Unrolled(last=0, recompute=True), 0),
    "forward": (mf.Unrolled(hvp=mf.hvp_forward), None),
    "last=2,forward": (mf.Unrolled(last=2, hvp=mf.hvp_forward), 2),
    "finite": (mf.Unrolled(hvp=mf.hvp_finite()), None),
    "finite(1e-5)": (mf.Unrolled(hvp=mf.hvp_finite(1e-5)), None),
}


def tolerance(name: str) -> float:
    # Exact estimators differ from the naive loop by the order of float64 sums only. Central
    # differences of first derivatives with the best step have u^(2/3) = 4e-11 of the third
    # derivative; Adam divides by small roots and so enlarges both by about a thousand.
    return 1e-6 if name.startswith("finite") else 1e-11


def by_backward(meta, case):
    leaves = case.leaves()
    meta(leaves, case.episode(0))[0].backward()
    return grads_of(leaves)


def by_hypergrad(meta, case):
    return mf.hypergrad(meta)(case.outer, case.episode(0))[0]


def by_func_grad(meta, case):
    return torch.func.grad(lambda o: meta(o, case.episode(0))[0])(case.outer)


def by_vmap_of_grad(meta, case):
    one = torch.func.grad(meta, has_aux=True)
    grads, _ = torch.func.vmap(one, in_dims=(None, 0))(case.outer, case.episodes)
    return {k: v.mean(0) for k, v in grads.items()}


def by_vmap_of_hypergrad(meta, case):
    grads, _ = torch.func.vmap(mf.hypergrad(meta), in_dims=(None, 0))(case.outer, case.episodes)
    return {k: v.mean(0) for k, v in grads.items()}


def by_grad_of_vmap(meta, case):
    return torch.func.grad(lambda o: mf.over_tasks(meta)(o, case.episodes)[0])(case.outer)


def _backward_over_tasks(meta, case, **options):
    leaves = case.leaves()
    mf.over_tasks(meta, **options)(leaves, case.episodes)[0].backward()
    return grads_of(leaves)


def by_vmap_over_outer(meta, case):
    many = {k: torch.stack([v] * case.tasks) for k, v in case.outer.items()}
    grads, _ = torch.func.vmap(torch.func.grad(meta, has_aux=True))(many, case.episodes)
    return {k: v.mean(0) for k, v in grads.items()}


ONE = {"backward": by_backward, "hypergrad": by_hypergrad, "func.grad": by_func_grad}
MANY = {
    "vmap(grad)": by_vmap_of_grad,
    "vmap(hypergrad)": by_vmap_of_hypergrad,
    "vmap(grad) over outer": by_vmap_over_outer,
    "grad(vmap)": by_grad_of_vmap,
    "backward(vmap)": _backward_over_tasks,
    "backward(chunks)": functools.partial(_backward_over_tasks, chunk_size=2),
    "backward(loop)": functools.partial(_backward_over_tasks, how="loop"),
}
WAYS = {**ONE, **MANY}


def expected(found, way):
    if way in ONE:
        return found[0]
    return {k: torch.stack([g[k] for g in found]).mean(0) for k in found[0]}


HVPS = {"reverse": mf.hvp_reverse, "forward": mf.hvp_forward, "finite": mf.hvp_finite()}


SECOND = {
    "FirstOrder": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "last=2": mf.Unrolled(last=2),
    "recompute": mf.Unrolled(recompute=True),
    "recompute=2": mf.Unrolled(recompute=2),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "Implicit(CG)": mf.Implicit(mf.CG(13)),
    "Implicit(CG, forward)": mf.Implicit(mf.CG(13), mf.hvp_forward),
    "Implicit(Dense)": mf.Implicit(mf.Dense()),
    "Implicit(Neumann)": mf.Implicit(mf.Neumann(40, 0.04)),
}


def tape_grad(loss):
    def grad(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return grad


def fast_sgd(quadratic: Quadratic, steps: int = 250) -> mf.SGD:
    """Heavy ball with the best settings for condition 100: error (9 / 11)^steps."""
    return mf.SGD(4 / (1 + 10) ** 2, steps, momentum=(9 / 11) ** 2)
