"""hypertorch: update maps, and the gradient through their graph or by rebuilding each."""

from __future__ import annotations

import torch
from hypergrad.diff_optimizers import GradientDescent, Momentum
from hypergrad.hypergradients import CG, reverse, reverse_unroll
from torch.func import functional_call

from benchmarks.rivals.common import Contenders, flat
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4
from benchmarks.rivals.workloads import w5 as W5

PACKAGE = "hypertorch"


def gradients(names, outer, inner_loss, outer_loss, step, steps, width) -> Contenders:
    """Return both of its ways to the gradient by the initial parameters.

    Args:
        names: of the parameters.
        outer: the initial parameters.
        inner_loss: of a dict.
        outer_loss: of a dict.
        step: loss -> one of its optimisers.
        steps: how many.
        width: how many lists of parameters the optimiser carries.
    """
    count = len(names)

    def of(loss):
        return lambda params, hparams: loss(dict(zip(names, params[:count], strict=True)))

    def unrolled(i):
        optimizer = step(of(lambda p: inner_loss(p, i)))
        params = optimizer.get_opt_params(outer)
        for _ in range(steps):
            params = optimizer(params, outer, create_graph=True)
        return reverse_unroll(params, outer, of(lambda p: outer_loss(p, i)), set_grad=False)

    def rebuilt(i):
        optimizer = step(of(lambda p: inner_loss(p, i)))

        def first(params, hparams):
            # It cannot differentiate by the start: a first map returns the start.
            fresh = [*hparams, *(torch.zeros_like(h) for h in hparams * (width - 1))]
            return [f + 0 * p for f, p in zip(fresh, params, strict=True)]

        params = [p.detach() for p in optimizer.get_opt_params(outer)]
        history = [params, params]
        for _ in range(steps):
            at = [p.detach().requires_grad_() for p in history[-1]]
            history.append([p.detach() for p in optimizer(at, outer, create_graph=False)])
        maps = [first] + [optimizer] * steps
        return reverse(history, outer, maps, of(lambda p: outer_loss(p, i)), set_grad=False)

    return {"hypertorch unroll": unrolled, "hypertorch reverse": rebuilt}


def maml(data, case, workload) -> Contenders:
    if case["order"] == 1:
        return {}
    net, start = workload.network(), data["params"]
    (sx, sy), (qx, qy) = data["support"], data["query"]
    outer = [v.detach().clone().requires_grad_() for v in start.values()]

    def inner_loss(params, i):
        return workload.loss(functional_call(net, params, (sx[i],)), sy[i])

    def outer_loss(params, i):
        return workload.loss(functional_call(net, params, (qx[i],)), qy[i]) / len(sx)

    ways = gradients(
        list(start),
        outer,
        inner_loss,
        outer_loss,
        lambda loss: GradientDescent(loss, workload.RATE),
        case["steps"],
        1,
    )

    def over_tasks(way):
        def run():
            total = [torch.zeros_like(v) for v in outer]
            for i in range(len(sx)):
                for t, g in zip(total, way(i), strict=True):
                    t.data.add_(g)
            return flat(total)

        return run

    return {label: over_tasks(way) for label, way in ways.items()}


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)


def w3(data, case):
    net, start = W3.network(case), data["params"]
    outer = [v.detach().clone().requires_grad_() for v in start.values()]

    def loss(params, _):
        return W3.loss(functional_call(net, params, (data["x"],)), data["y"])

    def step(value):
        return Momentum(value, W3.RATE, W3.MOMENTUM)

    ways = gradients(list(start), outer, loss, loss, step, case["steps"], 2)

    def of(way):
        return lambda: flat(way(0))

    return {label: of(way) for label, way in ways.items()}


def w4(data, case):
    def run():
        reg = data["log_l2"].clone().requires_grad_()

        def step(params, hparams):
            value = W4.inner(params[0], hparams[0], *data["train"])
            (g,) = torch.autograd.grad(value, params, create_graph=True)
            return [params[0] - g]

        def outer(params, hparams):
            return W4.outer(params[0], *data["test"])

        return flat(CG([data["w"]], [reg], case["products"], step, outer, set_grad=False))

    return {"hypertorch CG": run}


def w5(data, case):
    net = W5.adapted(case, data["params"])
    outer, names = list(net.parameters()), [k for k, _ in net.named_parameters()]
    at = [i for i, k in enumerate(names) if W5.is_fast(k)]

    def of(ids):
        def value(params, hparams):
            values = dict(zip(names, hparams, strict=True))
            values |= {names[i]: p for i, p in zip(at, params, strict=True)}
            return W5.loss(lambda **inputs: functional_call(net, values, (), inputs), ids)

        return value

    def update():
        # It holds its last graph: one for each call, or the next would find that memory taken.
        return GradientDescent(of(data["support"]), W5.RATE)

    def unrolled():
        step = update()
        with W5.twice_differentiable():
            params = [outer[i] for i in at]
            for _ in range(case["steps"]):
                params = step(params, outer, create_graph=True)
            return flat(reverse_unroll(params, outer, of(data["query"]), set_grad=False))

    def first(params, hparams):
        # It cannot differentiate by the start: a first map returns the start.
        return [hparams[i] + 0 * p for i, p in zip(at, params, strict=True)]

    def rebuilt():
        step = update()
        with W5.twice_differentiable():
            params = [outer[i].detach() for i in at]
            history = [params, params]
            for _ in range(case["steps"]):
                here = [p.detach().requires_grad_() for p in history[-1]]
                history.append([p.detach() for p in step(here, outer, create_graph=False)])
            maps = [first] + [step] * case["steps"]
            return flat(reverse(history, outer, maps, of(data["query"]), set_grad=False))

    return {"hypertorch unroll": unrolled, "hypertorch reverse": rebuilt}
