"""This library."""

from __future__ import annotations

from torch.func import functional_call

import metafocus as mf
from benchmarks import focusft_step
from benchmarks.rivals.common import Contenders, flat
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4
from benchmarks.rivals.workloads import w5 as W5
from benchmarks.rivals.workloads import w6 as W6

PACKAGE = None


def inputs(data):
    return data["params"], mf.Episode(tuple(data["support"]), tuple(data["query"]))


def maml_gradient(data, case, workload, **layout):
    net = workload.network()

    def loss(fast, slow, batch):
        x, y = batch
        return workload.loss(functional_call(net, fast, (x,)), y)

    problem = mf.Problem(loss, loss)
    estimator = mf.Unrolled() if case["order"] == 2 else mf.FirstOrder()
    meta = mf.bilevel(problem, solver=mf.SGD(workload.RATE, case["steps"]), estimator=estimator)
    return mf.hypergrad(mf.over_tasks(meta, **layout))


def maml(data, case, workload, **layouts) -> Contenders:
    start, episodes = inputs(data)

    def contender(layout):
        gradient = maml_gradient(data, case, workload, **layout)
        return lambda: flat(gradient(start, episodes)[0].values())

    return {f"metafocus {name}": contender(layout) for name, layout in layouts.items()}


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
        problem = mf.Problem(loss, loss)
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
    problem = mf.Problem(inner, outer, init=lambda slow, support: solution)
    estimator = mf.Implicit(mf.CG(case["products"]))
    gradient = mf.hypergrad(mf.bilevel(problem, solver=solver, estimator=estimator))
    start, episode = {"log_l2": data["log_l2"]}, mf.Episode(data["train"], data["test"])
    return {"metafocus Implicit(CG(20))": lambda: gradient(start, episode)[0]["log_l2"]}


def w5(data, case):
    model, params = W5.plain(case), data["params"]
    fast_names = [k for k in params if W5.is_fast(k)]
    adapter = mf.LoRA(mf.matching("|".join(rf".*\.{m}" for m in W5.MODULES)), W5.RANK, W5.RANK)
    score = mf.lm_loss(model, adapter=adapter, mask=mf.masks.causal, tokens=mf.all_tokens)

    def loss(fast, slow, batch):
        return score(fast, {k: v for k, v in slow.items() if k not in fast}, batch)

    problem = mf.Problem(loss, loss, init=lambda slow, support: {k: slow[k] for k in fast_names})

    def contender(estimator):
        meta = mf.bilevel(problem, solver=mf.SGD(W5.RATE, case["steps"]), estimator=estimator)
        gradient = mf.hypergrad(meta)

        def call():
            # The mask, once for all inner steps.
            batches = [score.prepare({"input_ids": data[k]}) for k in ("support", "query")]
            return flat(gradient(params, mf.Episode(*batches))[0].values())

        return call

    found = {
        "metafocus graph": contender(mf.Unrolled()),
        "metafocus recompute=True": contender(mf.Unrolled(recompute=True)),
        "metafocus recompute=2": contender(mf.Unrolled(recompute=2)),
    }
    if case["steps"] <= W5.LONGEST_FORWARD:
        found["metafocus hvp_forward"] = contender(mf.Unrolled(hvp=mf.hvp_forward))
    return found


def w6(data, case):
    given = W6.size(case), case["checkpointing"]
    return {
        "metafocus": focusft_step.ours(*given, data["start"]),
        W6.BASELINES[0]: focusft_step.plain(*given),
        W6.BASELINES[1]: focusft_step.transformers_sft(*given),
    }
