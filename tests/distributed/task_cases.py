"""MAML and iMAML on two processes that share the tasks, by `over_tasks(group=)` and under DDP."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

import rank_pool as pool

import metafocus as mf
from metafocus.recipes import fewshot
from metafocus.sharding import plain_names
from metafocus.torch_internals import pytree
from metafocus.trainer.distributed import parametrise, through

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


def heads_on(net: nn.Module, estimator: str):
    """ANIL's problem: features of the slow weights, a head of fast weights that starts at zero."""

    def loss(fast, slow, data):
        features = torch.func.functional_call(net, slow, (data[0],))
        error = ((features @ fast["head"] - data[1]) ** 2).mean()
        return error + 0.1 * (fast["head"] ** 2).sum()

    def start(slow, support):
        return {"head": torch.zeros(20, 1, dtype=torch.float64)}

    solver = mf.SGD(0.05, steps=3)
    problem = mf.Problem(loss, loss, start)
    return mf.bilevel(problem, solver=solver, estimator=(ESTIMATORS | MORE)[estimator])


MORE = {"penalty": mf.Penalty(1e-2), "evograd": mf.EvoGrad(0.1), "truncated": mf.Unrolled(last=1)}


def features() -> nn.Module:
    torch.manual_seed(1)
    # Five rows do not divide by two processes, and one row is for one of them alone.
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 20)).double()


def one_episode(rank: int):
    return pytree.tree_map(lambda x: x[rank], episodes())


def own_loop_alone(estimator: str):
    """The mean of the gradients of both processes' episodes."""
    net = features()
    meta, outer = heads_on(net, estimator), mf.trainable(net)
    found = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        found.append(mf.hypergrad(meta)(outer, one_episode(rank))[0])
    return {"grads": {k: (found[0][k] + found[1][k]).detach() / 2 for k in outer}}


def own_loop(estimator: str, rank: int):
    """A loop of one's own over parametrised weights, by `hypergrad` and by `backward`."""
    net = parametrise(features(), init_device_mesh("cpu", (dist.get_world_size(),)))
    meta, outer = heads_on(net, estimator), mf.trainable(net)
    torch.manual_seed(rank)
    grads, _ = mf.hypergrad(meta)(outer, one_episode(rank))
    torch.manual_seed(rank)
    meta(outer, one_episode(rank))[0].backward()
    assert all(torch.equal(grads[k].to_local(), p.grad.to_local()) for k, p in outer.items())
    plain = plain_names(net)
    return {"grads": {plain[k]: g.full_tensor() for k, g in grads.items()}}


def copies_of_shards(rank: int):
    """MAML's start would be this process's part of each weight."""
    net = parametrise(network(), init_device_mesh("cpu", (dist.get_world_size(),)))

    def loss(fast, slow, data):
        return ((torch.func.functional_call(net, fast, (data[0],)) - data[1]) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 1), estimator=mf.FirstOrder())
    meta(mf.trainable(net), one_episode(rank))


# --- what only some ranks need -----------------------------------------------------------------


def own_gains(rank: int | None):
    """Each rank's tasks have a gain of their own; alone, all tasks of both ranks have them."""
    start = torch.tensor([0.5, -1.0], dtype=torch.float64)
    outer = {"w": start, "0": torch.tensor(0.7).double(), "1": torch.tensor([1.3]).double()}
    outer = {name: value.requires_grad_() for name, value in outer.items()}
    whole = torch.arange(14.0).double().sin().reshape(7, 2)
    # Whose task it is, as a number and not a choice, where one process has the tasks of both.
    whose = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).double()

    def loss(fast, slow, data):
        x, at = data
        gain = slow[str(rank)] if rank is not None else (1 - at) * slow["0"] + at * slow["1"]
        return ((fast["w"] * gain - x) ** 2).sum() + (gain**3).sum()

    problem = mf.Problem(loss, loss, lambda slow, support: {"w": slow["w"]})
    part = slice(None) if rank is None else slice(4) if rank == 0 else slice(4, None)
    data = (whole[part].clone().requires_grad_(), whose[part])
    return problem, outer, mf.Episode(data, data)


def first_and_second(settings, group, rank: int | None):
    """Gradients by outer, of their squares by outer, and by the data, for this rank's tasks."""
    problem, outer, episodes = own_gains(rank)
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps=2), estimator=mf.Unrolled())
    over = mf.over_tasks(meta, group=group, **settings)
    free = pytree.tree_map(torch.Tensor.detach, episodes)
    grads = torch.autograd.grad(over(outer, free)[0], list(outer.values()), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in grads), list(outer.values()))
    third, _ = mf.hypergrad(over)(outer, free)
    data = torch.autograd.grad(over(outer, episodes)[0], episodes.support[0])[0]
    found = {"first": grads, "second": second, "hypergrad": list(third.values())}
    return {k: [x.detach() for x in v] for k, v in found.items()} | {"data": data}


def own_gains_alone():
    return first_and_second({}, None, None)


def own_gains_shared(how: str, rank: int):
    return first_and_second(HOW[how], dist.group.WORLD, rank)


def outside_of_outer(rank: int):
    """The model's own parameters, which the loss closes over: outer is empty."""
    net = network()

    def loss(fast, slow, data):
        return ((net(data[0]) * fast["gain"] - data[1]) ** 2).mean()

    problem = mf.Problem(loss, loss, lambda slow, support: {"gain": torch.ones(1).double()})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
    mf.over_tasks(meta, group=dist.group.WORLD)({}, part(SIZES["uneven"], rank))


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

OWN = [*ESTIMATORS, *MORE]

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pool.alone({f"{name}": partial(alone, name) for name in ESTIMATORS}, folder)
    pool.alone({f"own, {name}": partial(own_loop_alone, name) for name in OWN}, folder)
    pool.alone({"own gains": own_gains_alone}, folder)
    gains = {f"own gains, {how}": partial(own_gains_shared, how) for how in HOW}
    last = {"without tasks": without_tasks, "copies": copies_of_shards, "outside": outside_of_outer}
    pool.run(
        {**CASES, **gains, **last, **{f"own, {name}": partial(own_loop, name) for name in OWN}},
        folder,
    )
