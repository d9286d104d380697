"""This library."""

from __future__ import annotations

from torch.func import functional_call

import metafocus as mf
from benchmarks.rivals.common import Contenders, flat
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4

PACKAGE = None


def maml(data, case, workload, **layouts) -> Contenders:
    net, start = workload.network(), data["params"]
    episodes = mf.Episode(tuple(data["support"]), tuple(data["query"]))

    def loss(fast, slow, batch):
        x, y = batch
        return workload.loss(functional_call(net, fast, (x,)), y)

    problem = mf.Problem(loss, loss, init=lambda slow: slow)
    estimator = mf.Unrolled() if case["order"] == 2 else mf.FirstOrder()
    meta = mf.bilevel(problem, solver=mf.SGD(workload.RATE, case["steps"]), estimator=estimator)

    def contender(options):
        gradient = mf.hypergrad(mf.over_tasks(meta, **options))
        return lambda: flat(gradient(start, episodes)[0].values())

    return {f"metafocus {name}": contender(options) for name, options in layouts.items()}


def w1(data, case):
    return maml(data, case, W1, vmap={}, loop={"how": "loop"})


def w2(data, case):
    chunks = {f"chunk={n}": {"chunk_size": n} for n in (1, 2) if n < case["tasks"]}
    return maml(data, case, W2, loop={"how": "loop"}, vmap={}, **chunks)


def w3(data, case):
    net, start, x, y = W3.network(case), data["params"], data["x"], data["y"]

    def loss(fast, slow, batch):
        return W3.loss(functional_call(net, fast, (x,)), y)

    def contender(estimator):
        solver = mf.SGD(W3.RATE, case["steps"], momentum=W3.MOMENTUM)
        problem = mf.Problem(loss, loss, init=lambda slow: slow)
        gradient = mf.hypergrad(mf.bilevel(problem, solver=solver, estimator=estimator))
        return lambda: flat(gradient(start, mf.Episode(None, None))[0].values())

    found = {"metafocus graph": contender(mf.Unrolled())}
    for size in (True, 7, 12, 14):
        found[f"metafocus recompute={size}"] = contender(mf.Unrolled(recompute=size))
    return found


def w7(data, case):
    return maml(data, case, W1, vmap={})


def w4(data, case):
    solution = {"w": data["w"]}

    def inner(fast, slow, batch):
        return W4.inner(fast["w"], slow["log_l2"], *batch)

    def outer(fast, slow, batch):
        return W4.outer(fast["w"], *batch)

    solver = mf.Given(lambda slow, support: solution)
    problem = mf.Problem(inner, outer, init=lambda slow: solution)
    estimator = mf.Implicit(mf.CG(case["products"]))
    gradient = mf.hypergrad(mf.bilevel(problem, solver=solver, estimator=estimator))
    start, episode = {"log_l2": data["log_l2"]}, mf.Episode(data["train"], data["test"])
    return {"metafocus Implicit(CG(20))": lambda: gradient(start, episode)[0]["log_l2"]}
