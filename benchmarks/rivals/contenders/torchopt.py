"""TorchOpt: meta-optimisers that move a module, and functional ones."""

from __future__ import annotations

import torch
import torchopt
from torch.func import functional_call, grad, vmap

from benchmarks.rivals.common import Contenders, flat, loaded, take_grads
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4
from benchmarks.rivals.workloads import w5 as W5

PACKAGE = "torchopt"


def maml(data, case, workload) -> Contenders:
    net = loaded(workload.network(), data["params"])
    start, second, rate = data["params"], case["order"] == 2, workload.RATE
    (sx, sy), (qx, qy) = data["support"], data["query"]
    tasks = len(sx)

    def meta():
        optimizer = torchopt.MetaSGD(net, lr=rate)
        params = tuple(net.parameters())
        before = torchopt.extract_state_dict(net), torchopt.extract_state_dict(optimizer)
        for i in range(tasks):
            for _ in range(case["steps"]):
                optimizer.step(workload.loss(net(sx[i]), sy[i]))
            (workload.loss(net(qx[i]), qy[i]) / tasks).backward()
            torchopt.recover_state_dict(net, before[0])
            torchopt.recover_state_dict(optimizer, before[1])
        return take_grads(params)

    rule = torchopt.sgd(lr=rate)

    def call(params, x):
        return functional_call(net, params, (x,))

    def task(params, sx, sy, qx, qy):
        state, fast = rule.init(params), params
        for _ in range(case["steps"]):
            grads = grad(lambda p: workload.loss(call(p, sx), sy))(fast)
            if not second:
                grads = {k: g.detach() for k, g in grads.items()}
            updates, state = rule.update(grads, state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        return workload.loss(call(fast, qx), qy)

    batched = vmap(task, in_dims=(None, 0, 0, 0, 0))

    def functional():
        outer = {k: v.detach().requires_grad_() for k, v in start.items()}
        value = batched(outer, sx, sy, qx, qy).mean()
        return flat(torch.autograd.grad(value, list(outer.values())))

    found = {"TorchOpt functional in vmap": functional}
    # MetaSGD has no first-order switch.
    return {"TorchOpt MetaSGD": meta, **found} if second else found


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)


def w3(data, case):
    net, x, y = loaded(W3.network(case), data["params"]), data["x"], data["y"]

    def run():
        optimizer = torchopt.MetaSGD(net, lr=W3.RATE, momentum=W3.MOMENTUM)
        params = tuple(net.parameters())
        before = torchopt.extract_state_dict(net)
        for _ in range(case["steps"]):
            optimizer.step(W3.loss(net(x), y))
        found = flat(torch.autograd.grad(W3.loss(net(x), y), params))
        torchopt.recover_state_dict(net, before)
        return found

    return {"TorchOpt MetaSGD": run}


def w4(data, case):
    def optimality(w, log_l2):
        return grad(W4.inner)(w, log_l2, *data["train"])

    # No tolerance: all take the same number of products.
    solve = torchopt.linear_solve.solve_cg(maxiter=case["products"], rtol=0.0, atol=0.0)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
    def solution(w, log_l2):
        return w

    def run():
        reg = data["log_l2"].clone().requires_grad_()
        value = W4.outer(solution(data["w"], reg), *data["test"])
        return flat(torch.autograd.grad(value, [reg]))

    return {"TorchOpt custom_root, CG": run}


def w5(data, case):
    net = W5.adapted(case, data["params"])
    outer = dict(net.named_parameters())
    rule = torchopt.sgd(lr=W5.RATE)

    def loss(values, ids):
        return W5.loss(lambda **inputs: functional_call(net, values, (), inputs), ids)

    def run():
        fast = {k: v for k, v in outer.items() if W5.is_fast(k)}
        state = rule.init(fast)
        with W5.twice_differentiable():
            for _ in range(case["steps"]):
                value = loss({**outer, **fast}, data["support"])
                grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
                grads = dict(zip(fast, grads, strict=True))
                updates, state = rule.update(grads, state, inplace=False)
                fast = torchopt.apply_updates(fast, updates, inplace=False)
            value = loss({**outer, **fast}, data["query"])
            return flat(torch.autograd.grad(value, list(outer.values())))

    return {"TorchOpt functional": run}
