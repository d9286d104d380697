"""higher: patched modules and optimisers."""

from __future__ import annotations

import higher
import torch

from benchmarks.rivals.common import Contenders, flat, loaded, take_grads
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w5 as W5

PACKAGE = "higher"


def maml(data, case, workload) -> Contenders:
    net = loaded(workload.network(), data["params"])
    optimizer = torch.optim.SGD(net.parameters(), lr=workload.RATE)
    (sx, sy), (qx, qy) = data["support"], data["query"]
    second = case["order"] == 2
    callback = None if second else lambda grads: [g.detach() for g in grads]

    def run():
        for i in range(len(sx)):
            context = higher.innerloop_ctx(net, optimizer, copy_initial_weights=False)
            with context as (model, inner):
                for _ in range(case["steps"]):
                    inner.step(workload.loss(model(sx[i]), sy[i]), grad_callback=callback)
                (workload.loss(model(qx[i]), qy[i]) / len(sx)).backward()
        return take_grads(net.parameters())

    return {"higher": run}


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)


def w3(data, case):
    net, x, y = loaded(W3.network(case), data["params"]), data["x"], data["y"]
    optimizer = torch.optim.SGD(net.parameters(), lr=W3.RATE, momentum=W3.MOMENTUM)

    def run():
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (model, inner):
            for _ in range(case["steps"]):
                inner.step(W3.loss(model(x), y))
            return flat(torch.autograd.grad(W3.loss(model(x), y), list(net.parameters())))

    return {"higher": run}


def w7(data, case):
    return maml(data, case, W1)


def w5(data, case):
    net = W5.adapted(case, data["params"])
    fast = [p for k, p in net.named_parameters() if W5.is_fast(k)]
    optimizer = torch.optim.SGD(fast, lr=W5.RATE)

    def run():
        context = higher.innerloop_ctx(net, optimizer, copy_initial_weights=False)
        with W5.twice_differentiable(), context as (model, inner):
            for _ in range(case["steps"]):
                inner.step(W5.loss(model, data["support"]))
            value = W5.loss(model, data["query"])
            return flat(torch.autograd.grad(value, list(net.parameters())))

    return {"higher": run}
