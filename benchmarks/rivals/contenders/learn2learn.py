"""learn2learn: clone and adapt. Its package asks for a gym; only its MAML is loaded."""

from __future__ import annotations

import torch

from benchmarks.rivals.common import Contenders, bare_package, flat, loaded, take_grads
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w5 as W5

bare_package("learn2learn")
bare_package("learn2learn.algorithms")

from learn2learn.algorithms.maml import MAML  # noqa: E402
from learn2learn.utils import clone_module, update_module  # noqa: E402

PACKAGE = "learn2learn"


def maml(data, case, workload) -> Contenders:
    net = loaded(workload.network(), data["params"])
    learner = MAML(net, lr=workload.RATE, first_order=case["order"] == 1)
    (sx, sy), (qx, qy) = data["support"], data["query"]

    def run():
        for i in range(len(sx)):
            clone = learner.clone()
            for _ in range(case["steps"]):
                clone.adapt(workload.loss(clone(sx[i]), sy[i]))
            (workload.loss(clone(qx[i]), qy[i]) / len(sx)).backward()
        return take_grads(net.parameters())

    return {"learn2learn MAML": run}


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)


def w3(data, case):
    # Its MAML has no momentum, the primitives below it have everything.
    net, x, y = loaded(W3.network(case), data["params"]), data["x"], data["y"]

    def run():
        clone = clone_module(net)
        velocity = [torch.zeros_like(p) for p in clone.parameters()]
        for _ in range(case["steps"]):
            value = W3.loss(clone(x), y)
            grads = torch.autograd.grad(value, list(clone.parameters()), create_graph=True)
            velocity = [W3.MOMENTUM * v + g for v, g in zip(velocity, grads, strict=True)]
            clone = update_module(clone, updates=[-W3.RATE * v for v in velocity])
        return flat(torch.autograd.grad(W3.loss(clone(x), y), list(net.parameters())))

    return {"learn2learn primitives": run}


def w7(data, case):
    return maml(data, case, W1)


def w5(data, case):
    # Its MAML adapts every parameter, the primitives below it those that get an update.
    net = W5.adapted(case, data["params"])
    names = [k for k, _ in net.named_parameters()]

    def run():
        clone = clone_module(net)
        with W5.twice_differentiable():
            for _ in range(case["steps"]):
                fast = [p for k, p in zip(names, clone.parameters(), strict=True) if W5.is_fast(k)]
                value = W5.loss(clone, data["support"])
                grads = iter(torch.autograd.grad(value, fast, create_graph=True))
                updates = [-W5.RATE * next(grads) if W5.is_fast(k) else None for k in names]
                clone = update_module(clone, updates=updates)
            value = W5.loss(clone, data["query"])
            return flat(torch.autograd.grad(value, list(net.parameters())))

    return {"learn2learn primitives": run}
