"""MAML and iMAML on two processes that share the tasks, by `over_tasks(group=)` and under DDP."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

import rank_pool as pool

import metafocus as mf
from metafocus.recipes import fewshot
from metafocus.torch_internals import pytree
from metafocus.trainer.distributed import through

ESTIMATORS = {
    "unrolled": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "first order": mf.FirstOrder(),
    "implicit": mf.Implicit(mf.CG(10)),
}
HOW = {
    "vmap": {"how": "vmap"},
    "loop": {"how": "loop"},
    "chunks": {"how": "vmap", "chunk_size": 2},
}
SIZES = {"even": [4, 4], "uneven": [5, 3]}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()


def episodes():
    generator = torch.Generator().manual_seed(0)
    return fewshot.sinusoids(8, 5, 5, generator=generator, dtype=torch.float64)


def part(sizes: list[int], rank: int):
    return pytree.tree_map(lambda x: x.split(sizes)[rank], episodes())


def meta_of(net: nn.Module, estimator: str, **settings):
    def loss(fast, data):
        return ((torch.func.functional_call(net, fast, (data[0],)) - data[1]) ** 2).mean()

    problem = fewshot.imaml(loss, 2.0) if estimator == "implicit" else fewshot.maml(loss)
    solver = mf.SGD(0.05, steps=3)
    made = mf.bilevel(problem, solver=solver, estimator=ESTIMATORS[estimator])
    return mf.over_tasks(made, **settings)


def alone(estimator: str):
    net = network()
    grads, (loss, _) = mf.hypergrad(meta_of(net, estimator))(mf.trainable(net), episodes())
    return {"loss": loss.item(), "grads": grads}


def shared(estimator: str, how: str, sizes: str, rank: int):
    net = network()
    meta = meta_of(net, estimator, group=dist.group.WORLD, **HOW[how])
    found = mf.hypergrad(meta)(mf.trainable(net), part(SIZES[sizes], rank))
    grads, (loss, aux) = found
    return {"loss": loss.item(), "grads": grads, "tasks": len(aux.inner_losses)}


def by_backward(estimator: str, rank: int):
    net = network()
    meta = meta_of(net, estimator, group=dist.group.WORLD)
    loss, aux = meta(mf.trainable(net), part(SIZES["uneven"], rank))
    loss.backward()
    grads = {k: p.grad for k, p in net.named_parameters()}
    return {"loss": loss.item(), "grads": grads, "tasks": len(aux.inner_losses)}


def under_ddp(estimator: str, rank: int):
    net = network()
    ddp, meta = DistributedDataParallel(net), meta_of(net, estimator)
    outer = mf.trainable(net)
    through(ddp, lambda e: meta(outer, e)[0], part(SIZES["even"], rank)).backward()
    return {"grads": {k: p.grad for k, p in net.named_parameters()}}


def beside_ddp(estimator: str, rank: int):
    ddp = DistributedDataParallel(network())
    meta = meta_of(ddp.module, estimator)
    meta(mf.trainable(ddp.module), part(SIZES["even"], rank))[0].backward()


def without_tasks(rank: int):
    net = network()
    meta = meta_of(net, "first order", group=dist.group.WORLD)
    tasks = part([8, 0], rank)
    meta(mf.trainable(net), tasks)


CASES = {
    f"{estimator}, {how}, {sizes}": partial(shared, estimator, how, sizes)
    for estimator in ESTIMATORS
    for how in HOW
    for sizes in SIZES
} | {
    f"{estimator}, {name}": partial(case, estimator)
    for estimator in ESTIMATORS
    for name, case in (("backward", by_backward), ("ddp", under_ddp), ("beside", beside_ddp))
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pool.alone({f"{name}": partial(alone, name) for name in ESTIMATORS}, folder)
    pool.run({**CASES, "without tasks": without_tasks}, folder)
