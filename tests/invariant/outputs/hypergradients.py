"""Hypergradients by every estimator and inner solver, in every way to differentiate."""

from __future__ import annotations

import torch
from outputs.networks import episodes, first, loss, weights
from outputs.versions import problem

import metafocus as mf


def backward(meta, outer, many):
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    value, aux = meta(leaves, first(many))
    value.backward()
    grads = {k: v.grad for k, v in leaves.items()}
    return {"loss": value, "grads": grads, "inner": aux.inner_losses, "adapted": aux.params}


def hypergrad(meta, outer, many):
    grads, (value, _) = mf.hypergrad(meta)(outer, first(many))
    return {"loss": value, "grads": grads}


def grad(meta, outer, many):
    return torch.func.grad(meta, has_aux=True)(outer, first(many))[0]


def vmap(meta, outer, many):
    return torch.func.vmap(meta, in_dims=(None, 0), randomness="same")(outer, many)[0]


def vmap_of_grad(meta, outer, many):
    each = torch.func.grad(meta, has_aux=True)
    return torch.func.vmap(each, in_dims=(None, 0), randomness="same")(outer, many)[0]


def grad_of_vmap(meta, outer, many):
    return torch.func.grad(lambda o: vmap(meta, o, many).mean())(outer)


def second_derivative(meta, outer, many):
    """The meta loss's Hessian times the outer parameters."""

    def along(o):
        grads, _ = torch.func.grad(meta, has_aux=True)(o, first(many))
        return sum((grads[k] * outer[k]).sum() for k in grads)

    return torch.func.grad(along)(outer)


FIRST = (backward, hypergrad, grad, vmap_of_grad, grad_of_vmap)
WAYS = (*FIRST, vmap, second_derivative)


def ways(estimator, chosen=WAYS, inner=loss, solver=None):
    """A function of a type that differentiates MAML in each way by an estimator made anew."""

    def run(dtype):
        found = {}
        for way in chosen:
            meta = mf.bilevel(
                problem(inner, loss), solver=solver or mf.SGD(0.1, steps=4), estimator=estimator()
            )
            found[way.__name__] = way(meta, weights(dtype), episodes(dtype))
        return found

    return run


def implicit(estimator, chosen=WAYS):
    return ways(estimator, chosen, mf.proximal(loss, 1.7), mf.SGD(0.2, steps=25))


def step(fast, slow, data):
    """One step of gradient descent, as a map with a fixed point."""
    grads = torch.func.grad(mf.proximal(loss, 1.7))(fast, slow, data)
    return {k: v - 0.2 * grads[k] for k, v in fast.items()}


def operators(fast, slow, data):
    """A loss of operators that some estimators swap for composites."""
    x, y = data
    fn = torch.nn.functional
    # A large eps: a small variance would make the norms ill-conditioned.
    h = fn.mish(x @ fast["0.weight"].T + fast["0.bias"])
    h = fn.batch_norm(h, None, None, training=True, eps=0.3)
    h = fn.group_norm(fn.gelu(fn.layer_norm(h, h.shape[-1:], eps=0.3)), 2, eps=0.3)
    out = fn.elu(h) @ fast["2.weight"].T + fast["2.bias"]
    q = out.reshape(1, 1, *out.shape)
    seen = fn.scaled_dot_product_attention(q, q, q, is_causal=True).reshape(out.shape)
    return fn.huber_loss(seen, y) + fn.mse_loss(out, y) + fn.smooth_l1_loss(out, 2 * y, beta=0.5)


def own_graph(fast, slow, data):
    """A loss with a gradient penalty: it makes a leaf and a graph of its own."""
    x, y = data
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(fast, slow, (x, y)), x, create_graph=True)
    return loss(fast, slow, data) + slope.square().sum()


def evograd():
    return mf.EvoGrad(0.1, copies=3, temperature=0.6, generator=torch.Generator().manual_seed(3))


HVP_FORWARD = mf.Unrolled(hvp=mf.hvp_forward)


def warm(dtype):
    """The adjoint of one solve as the start of the next one."""
    inner, outer, episode = mf.proximal(loss, 1.7), weights(dtype), first(episodes(dtype))
    solver, posed = mf.SGD(0.2, steps=25), problem(inner, loss)
    fast = mf.adapt(posed, outer, episode.support, solver=solver).params
    pull = torch.func.grad(loss)(fast, outer, episode.query)
    u = mf.adjoint(posed, outer, fast, episode.support, pull, solve=mf.CG(3))
    estimator = mf.Implicit(mf.WarmStart(mf.CG(2), u))
    meta = mf.bilevel(posed, solver=solver, estimator=estimator)
    return {"fast": fast, "u": u, "warm": hypergrad(meta, outer, episodes(dtype))}


ESTIMATORS = {
    "maml, graph": ways(mf.Unrolled),
    "maml, recompute": ways(lambda: mf.Unrolled(recompute=True)),
    "maml, recompute 2": ways(lambda: mf.Unrolled(recompute=2)),
    "maml, hvp_forward": ways(lambda: mf.Unrolled(hvp=mf.hvp_forward)),
    "maml, hvp_finite": ways(lambda: mf.Unrolled(hvp=mf.hvp_finite()), (backward, hypergrad)),
    "maml, truncated": ways(lambda: mf.Unrolled(last=2)),
    "maml, truncated recompute": ways(lambda: mf.Unrolled(last=3, recompute=2), FIRST),
    "maml, first order": ways(mf.FirstOrder),
    "maml, own graph": ways(mf.Unrolled, (backward, hypergrad), own_graph),
    "operators, graph": ways(mf.Unrolled, inner=operators),
    "operators, recompute": ways(lambda: mf.Unrolled(recompute=True), FIRST, operators),
    "operators, hvp_forward": ways(lambda: HVP_FORWARD, FIRST, operators),
    "operators, first order": ways(mf.FirstOrder, FIRST, operators),
    "operators, implicit": ways(lambda: mf.Implicit(mf.CG(2)), FIRST, operators),
    "imaml, CG": implicit(lambda: mf.Implicit(mf.CG(4))),
    "imaml, CG damped, hvp_forward": implicit(
        lambda: mf.Implicit(mf.CG(4, damping=0.1), hvp=mf.hvp_forward), FIRST
    ),
    "imaml, Neumann": implicit(lambda: mf.Implicit(mf.Neumann(5, 0.2))),
    "imaml, GMRES": implicit(lambda: mf.Implicit(mf.GMRES(4)), FIRST),
    "imaml, Nystrom": implicit(lambda: mf.Implicit(mf.Nystrom(6, 0.5)), FIRST),
    "imaml, dense": implicit(lambda: mf.Implicit(mf.Dense()), FIRST),
    "imaml, identity": implicit(lambda: mf.Implicit(mf.Identity(0.3)), FIRST),
    "imaml, warm start": warm,
    "penalty": implicit(lambda: mf.Penalty(50.0), FIRST),
    "penalty, central": implicit(lambda: mf.Penalty(50.0, central=True), FIRST),
    "fixed point": implicit(lambda: mf.FixedPoint(step), FIRST),
    "one step": implicit(lambda: mf.OneStep(step), FIRST),
    "evograd": ways(evograd, FIRST),
}

# --- inner solvers -------------------------------------------------------------------------------


def solver(make):
    def run(dtype):
        found = {}
        for name, estimator in (("graph", mf.Unrolled()), ("forward", HVP_FORWARD)):
            posed = problem(loss, loss, lambda slow: {k: slow[k] for k in weights(dtype)})
            meta = mf.bilevel(posed, solver=make(), estimator=estimator)
            outer = {**weights(dtype), "log_lr": torch.tensor(-2.5, dtype=dtype)}
            found[name] = backward(meta, outer, episodes(dtype))
        return found

    return run


def learned(outer):
    return outer["log_lr"].exp()


def scheduled():
    return mf.SGD(mf.per_step(lambda outer, t: (0.1, 0.05, 0.2)[t]), steps=3)


SOLVERS = {
    "momentum": solver(lambda: mf.SGD(learned, steps=3, momentum=0.8)),
    "nesterov, clipped": solver(
        lambda: mf.SGD(learned, 3, 0.8, True, weight_decay=0.1, clip=mf.clip_global(0.5))
    ),
    "clipped by tensor": solver(lambda: mf.SGD(learned, 3, clip=mf.clip_per_tensor(0.3))),
    "scheduled": ways(mf.Unrolled, FIRST, solver=scheduled()),
    "adam": solver(lambda: mf.Adam(learned, 3)),
    "adamw": solver(lambda: mf.AdamW(learned, 3, weight_decay=0.1)),
    "muon": solver(lambda: mf.Muon(learned, 3)),
    "rmsprop": solver(lambda: mf.RMSprop(learned, 3, momentum=0.5, centered=True)),
    "adagrad": solver(lambda: mf.Adagrad(learned, 3)),
}

OUTPUTS = {**ESTIMATORS, **SOLVERS}
