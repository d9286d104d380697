"""Betty: an engine that owns the loop; the gradient is fished out of the outer optimiser step."""

from __future__ import annotations

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem

from benchmarks.rivals.common import Contenders, flat, loaded
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4

PACKAGE = "betty"
LABEL = "Betty 0.1.1"


def unrolled(network, params, support, query, loss, steps, rate, momentum=0.0):
    """Return the meta-gradient over all tasks by one pass of its engine."""
    tasks = len(support[0])
    found = []

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return loss(self.inner(x), y)

        def get_batch(self):
            i = self._count % tasks - 1
            return query[0][i], query[1][i]

        def optimizer_step(self, *args, **kwargs):
            found.append(flat(p.grad for p in self.trainable_parameters()))

    class Inner(IterativeProblem):
        def on_inner_loop_start(self):
            self.params = tuple(p.clone() for p in self.outer.trainable_parameters())
            # Its velocities keep the graph of the task before.
            self.optimizer.state = [{} for _ in self.params]

        def forward(self, x):
            return self.fmodule(self.params, self.buffers, x)

        def training_step(self, batch):
            x, y = batch
            return loss(self(x), y)

        def get_batch(self):
            i = (self._count - 1) // steps % tasks
            return support[0][i], support[1][i]

    def problem(kind, name, **config):
        net = loaded(network(), params)
        return kind(
            name=name,
            config=Config(first_order=False, retain_graph=True, **config),
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum),
        )

    outer = problem(Outer, "outer", gradient_accumulation=tasks)
    inner = problem(Inner, "inner", unroll_steps=steps)
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )

    def run():
        found.clear()
        for _ in range(steps * tasks):
            engine.train_step()
        return found[0]

    return run


def maml(data, case, workload) -> Contenders:
    if case["order"] == 1:
        return {}
    arguments = data["params"], data["support"], data["query"], workload.loss
    run = unrolled(workload.network, *arguments, case["steps"], workload.RATE)
    return {LABEL: run}


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)


def w3(data, case):
    batch = data["x"][None], data["y"][None]
    arguments = data["params"], batch, batch, W3.loss, case["steps"], W3.RATE, W3.MOMENTUM
    return {LABEL: unrolled(lambda: W3.network(case), *arguments)}


class Weights(torch.nn.Module):
    """One tensor as a module."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())

    def forward(self):
        return self.value


def w4(data, case):
    found = []

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return W4.outer(self.inner(), *batch)

        def optimizer_step(self, *args, **kwargs):
            found.append(flat(p.grad for p in self.trainable_parameters()))

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            return W4.inner(self(), self.outer(), *batch)

        def optimizer_step(self, *args, **kwargs):
            """Stay at the solution."""

    def problem(kind, name, value, batch, **config):
        module = Weights(value)
        return kind(
            name=name,
            config=Config(retain_graph=True, **config),
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
            train_data_loader=[batch],
        )

    outer = problem(Outer, "outer", data["log_l2"], data["test"])
    settings = {"type": "cg", "cg_iterations": case["products"], "cg_alpha": 1.0}
    inner = problem(Inner, "inner", data["w"], data["train"], unroll_steps=1, **settings)
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )

    def run():
        found.clear()
        engine.train_step()
        return found[0]

    return {LABEL: run}
