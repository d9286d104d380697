"""torch alone: a loop of torch.autograd, and torch.func in the layouts that a user would write."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call, grad, vmap

from benchmarks.rivals.common import Contenders, flat
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4
from benchmarks.rivals.workloads import w5 as W5

PACKAGE = None


def maml(data: dict[str, Any], case: dict[str, Any], workload: Any) -> Contenders:
    net, loss, rate = workload.network(), workload.loss, workload.RATE
    start, second = data["params"], case["order"] == 2
    support, query = data["support"], data["query"]
    tasks = len(support[0])
    names = list(start)

    def call(params, x):
        return functional_call(net, params, (x,))

    def taped():
        outer = [v.detach().requires_grad_() for v in start.values()]
        total = [torch.zeros_like(v) for v in outer]
        for i in range(tasks):
            fast = outer
            for _ in range(case["steps"]):
                value = loss(
                    call(dict(zip(names, fast, strict=True)), support[0][i]), support[1][i]
                )
                grads = torch.autograd.grad(value, fast, create_graph=second)
                fast = [p - rate * g for p, g in zip(fast, grads, strict=True)]
            value = loss(call(dict(zip(names, fast, strict=True)), query[0][i]), query[1][i])
            for t, g in zip(total, torch.autograd.grad(value / tasks, outer), strict=True):
                t += g
        return flat(total)

    def task(params, sx, sy, qx, qy):
        fast = params
        for _ in range(case["steps"]):
            grads = grad(lambda p: loss(call(p, sx), sy))(fast)
            if not second:
                grads = {k: g.detach() for k, g in grads.items()}
            fast = {k: fast[k] - rate * grads[k] for k in fast}
        return loss(call(fast, qx), qy)

    arguments = (*support, *query)
    batched = vmap(task, in_dims=(None, 0, 0, 0, 0))

    def outer_tape():
        outer = {k: v.detach().requires_grad_() for k, v in start.items()}
        value = batched(outer, *arguments).mean()
        return flat(torch.autograd.grad(value, list(outer.values())))

    def outer_func():
        return flat(grad(lambda p: batched(p, *arguments).mean())(start).values())

    def grads_batched():
        found = vmap(grad(task), in_dims=(None, 0, 0, 0, 0))(start, *arguments)
        return flat(g.mean(0) for g in found.values())

    def func_loop():
        total = None
        for i in range(tasks):
            one = flat(grad(task)(start, *(a[i] for a in arguments)).values())
            total = one if total is None else total + one
        return total / tasks

    return {
        "torch.autograd loop": taped,
        "torch.func vmap": outer_tape,
        "torch.func grad(vmap)": outer_func,
        "torch.func vmap(grad)": grads_batched,
        "torch.func loop": func_loop,
    }


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    found = maml(data, case, W2)
    found.pop("torch.func loop")
    return found


def w3(data, case):
    net, start = W3.network(case), data["params"]
    x, y = data["x"], data["y"]

    def loss(values):
        return W3.loss(functional_call(net, dict(zip(start, values, strict=True)), (x,)), y)

    def taped():
        outer = [v.detach().requires_grad_() for v in start.values()]
        params, velocity = outer, [torch.zeros_like(v) for v in outer]
        for _ in range(case["steps"]):
            grads = torch.autograd.grad(loss(params), params, create_graph=True)
            velocity = [W3.MOMENTUM * v + g for v, g in zip(velocity, grads, strict=True)]
            params = [p - W3.RATE * v for p, v in zip(params, velocity, strict=True)]
        return flat(torch.autograd.grad(loss(params), outer))

    def final(outer):
        params, velocity = outer, [torch.zeros_like(v) for v in outer]
        for _ in range(case["steps"]):
            grads = grad(loss)(params)
            velocity = [W3.MOMENTUM * v + g for v, g in zip(velocity, grads, strict=True)]
            params = [p - W3.RATE * v for p, v in zip(params, velocity, strict=True)]
        return loss(params)

    return {
        "torch.autograd loop": taped,
        "torch.func.grad": lambda: flat(grad(final)(list(start.values()))),
    }


def w7(data, case):
    found = maml(data, case, W1)
    return {k: found[k] for k in ("torch.autograd loop", "torch.func vmap")}


def w4(data, case):
    def run():
        w, reg = data["w"].clone().requires_grad_(), data["log_l2"].clone().requires_grad_()
        value = W4.inner(w, reg, *data["train"])
        (g,) = torch.autograd.grad(value, w, create_graph=True)
        (b,) = torch.autograd.grad(W4.outer(w, *data["test"]), w)
        x, r, p = torch.zeros_like(b), b, b
        rr = (r * r).sum()
        for _ in range(case["products"]):
            (hp,) = torch.autograd.grad(g, w, p, retain_graph=True)
            alpha = rr / (p * hp).sum()
            x, r = x + alpha * p, r - alpha * hp
            new = (r * r).sum()
            p, rr = r + new / rr * p, new
        return flat([-torch.autograd.grad(g, reg, x)[0]])

    return {"torch.autograd by hand": run}


def w5(data, case):
    net = W5.adapted(case, data["params"])
    outer = list(net.parameters())
    names = [k for k, _ in net.named_parameters()]
    fast_names = [k for k in names if W5.is_fast(k)]

    def loss(values, ids):
        return W5.loss(lambda **inputs: functional_call(net, values, (), inputs), ids)

    def taped():
        start = dict(zip(names, outer, strict=True))
        fast = {k: start[k] for k in fast_names}
        with W5.twice_differentiable():
            for _ in range(case["steps"]):
                value = loss({**start, **fast}, data["support"])
                grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
                fast = {k: v - W5.RATE * g for (k, v), g in zip(fast.items(), grads, strict=True)}
            value = loss({**start, **fast}, data["query"])
            return flat(torch.autograd.grad(value, outer))

    return {"torch.autograd create_graph": taped}
