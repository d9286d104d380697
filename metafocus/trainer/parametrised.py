"""Weights sharded over processes and gathered by a parametrization, which has every derivative.

FSDP2 gathers weights in hooks, whose backward pass cannot be differentiated. Here each weight is a
DTensor shard, and `torch.nn.utils.parametrize` makes the whole weight of it by an all-gather that
is an ordinary function: it can be differentiated any number of times, forwards and in reverse.
(The construction is SimpleFSDP's, arXiv 2411.00284.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import parametrize

from metafocus.errors import ProblemError
from metafocus.parallel.collectives import Group, replicated
from metafocus.sharding import Gathers, plain_names, sharding_of
from metafocus.torch_internals import child_table

# The second names are those before torch 2.13, which deprecates them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Plan(NamedTuple):
    """How one weight is spread over the processes of a group, along its first axis."""

    shape: torch.Size
    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rows(self) -> int:
        """Rows of a part; the last parts may have fewer, or none."""
        return -(-self.shape[0] // self.ranks)

    def gathered(self, part: Tensor) -> Tensor:
        padded = part.new_zeros(self.rows, *self.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(self.ranks * self.rows, *self.shape[1:])
        _all_gather(whole, padded, group=self.group)
        return whole[: self.shape[0]].clone()

    def averaged(self, whole: Tensor) -> Tensor:
        padded = whole.new_zeros(self.ranks * self.rows, *self.shape[1:])
        padded[: self.shape[0]] = whole
        part = whole.new_empty(self.rows, *self.shape[1:])
        _reduce_scatter(part, padded, group=self.group)
        start = min(dist.get_rank(self.group) * self.rows, self.shape[0])
        return part[: min(self.rows, self.shape[0] - start)] / self.ranks


class _Moved(torch.autograd.Function):
    """From this process's part to the whole weight; back, to the mean over processes.

    The cotangent of a whole weight belongs to the loss of one process, the cotangent of a part to
    the mean of these losses. So each of the two directions is the transpose of the other.
    """

    @staticmethod
    def forward(x: Tensor, plan: _Plan, back: bool) -> Tensor:
        return plan.averaged(x) if back else plan.gathered(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.plan, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Moved.apply(cotangents[0], ctx.plan, not ctx.back), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Moved.apply(tangents[0], ctx.plan, ctx.back)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, plan, back = args
        if in_dims[0] is None:
            return _Moved.apply(x, plan, back), None
        # One collective after another.
        return torch.stack([_Moved.apply(y, plan, back) for y in x.unbind(in_dims[0])]), 0  # pyright: ignore


class _Gathered(Gathers):
    """The parametrization: a part in, as DTensor or as plain tensor, the whole weight out."""

    def __init__(self, plan: _Plan, sequence_group: Group):
        super().__init__()
        self.plan = plan
        self.sequence_group = sequence_group

    def forward(self, part: Tensor) -> Tensor:
        if isinstance(part, DTensor):
            part = part.to_local()
        # Ranks that share a sequence add up their gradients; the mean is over what remains.
        return replicated(_Moved.apply(part, self.plan, False), self.sequence_group)  # pyright: ignore


def parametrise(model: nn.Module, mesh: DeviceMesh, *, sequence_group: Group = None) -> nn.Module:
    """Shard all parameters of a model over a mesh, so that every estimator works on it.

    Each parameter becomes a DTensor that holds a part of its rows on each process, and the module
    sees `all_gather(part)`, a function with derivatives of every order. A gradient is the mean over
    processes, as with DDP and FSDP2, so each process passes its own batch. Weights, gradients and
    the states of an optimiser take `1 / processes` of the memory; a gathered weight lives as long
    as the graph that needs it. With activation checkpointing that is one layer at a time.

    Parameters keep their modules and get longer names (`...parametrizations.weight.original`);
    `whole_state(model)` returns the plain ones. Tied parameters stay tied.

    Args:
        model: changed in place. All processes must have built it; the values of the first count.
        mesh: of one axis, such as `init_device_mesh("cuda", (8,))`.
        sequence_group: the processes of the mesh that share each sequence with this one, if losses
            are given it too (`mf.parallel.sequence_group`).

    Returns:
        The model.

    Raises:
        ProblemError: for a mesh of several axes, a model that is sharded already, a parameter that
            is a scalar, or one that has a parametrization of its own.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = parametrise(nn.Linear(3, 2), init_device_mesh("cpu", (1,)))
        >>> isinstance(layer.parametrizations.weight.original, DTensor), layer.weight.shape
        (True, torch.Size([2, 3]))
        >>> sorted(whole_state(layer))
        ['bias', 'weight']
        >>> dist.destroy_process_group()

    References:
        SimpleFSDP, arXiv 2411.00284.
    """
    if mesh.ndim != 1:
        raise ProblemError(
            f"mesh has {mesh.ndim} axes {mesh.mesh_dim_names or ''}: parametrise shards over one. "
            "Pass mesh['name of the axis']."
        )
    found = sharding_of(model)
    if found:
        raise ProblemError(
            f"the model is sharded already ({found}): parametrise takes the place of fully_shard "
            "and of tp_plan."
        )
    _refuse_own(model)
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        for name, weight in list(
            module.named_parameters(path, recurse=False, remove_duplicate=False)
        ):
            if weight.ndim == 0:
                raise ProblemError(
                    f"the parameter {name} is a scalar and has no rows to shard: make it a tensor "
                    "of shape [1]."
                )
            if id(weight) not in made:
                shards = distribute_tensor(weight.detach(), mesh, [Shard(0)])
                made[id(weight)] = nn.Parameter(shards, requires_grad=weight.requires_grad)
            own, plan = name.rpartition(".")[2], _Plan(weight.shape, mesh.get_group())
            setattr(module, own, made[id(weight)])
            parametrize.register_parametrization(
                module, own, _Gathered(plan, sequence_group), unsafe=True
            )
        # A module's own parameters come before those of its children, as they did: the states of an
        # optimiser are saved in the order of the parameters.
        table = child_table(module)
        if "parametrizations" in table:
            children = dict(table)
            table.clear()
            table["parametrizations"] = children.pop("parametrizations")
            table.update(children)
    return model


def _refuse_own(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, found in (getattr(module, "parametrizations", None) or {}).items():
            weight = f"{path}.{name}".removeprefix(".")
            raise ProblemError(
                f"the weight {weight!r} has a parametrization of its own "
                f"({type(found[0]).__name__}), which would see a part of what it parametrizes. "
                "Remove it with torch.nn.utils.parametrize.remove_parametrizations, or do not "
                "shard this model."
            )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a parametrised model with plain names and whole tensors.

    All processes must call it. It is what `model.save_pretrained(folder, state_dict=...)` takes.
    """
    found: dict[str, Tensor] = {}
    plain = plain_names(model)
    whole: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        # Tied weights are one tensor here too, so that they are saved once.
        if id(value) not in whole:
            part = value.detach()
            whole[id(value)] = part.full_tensor() if isinstance(part, DTensor) else part
        found[plain.get(name, name)] = whole[id(value)]
    return found


@torch.no_grad()
def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy plain, whole tensors into a parametrised model; names that it lacks are ignored.

    All processes must call it with the same values. Names are those of the model, or of a PEFT
    adapter, which leaves the name of the adapter out.

    Raises:
        ProblemError: if a parameter that is trained is missing.
    """
    adapter = f".{getattr(model, 'active_adapter', None)}."
    names = plain_names(model)

    def found(name: str) -> Tensor | None:
        plain = names.get(name, name)
        return state.get(plain, state.get(plain.replace(adapter, ".")))

    missing = [k for k, p in model.named_parameters() if p.requires_grad and found(k) is None]
    if missing:
        raise ProblemError(
            f"the weights lack {names.get(missing[0], missing[0])}, which is trained."
        )
    for name, value in model.state_dict(keep_vars=True).items():
        new = found(name)
        if new is not None and isinstance(value, DTensor):
            value.copy_(like(value, new))
        elif new is not None:
            value.copy_(new)


def like(shards: DTensor, whole: Tensor) -> DTensor:
    """Return a whole tensor, which all processes have, as it is sharded elsewhere."""
    whole = whole.to(shards.device, shards.dtype)
    return distribute_tensor(whole, shards.device_mesh, shards.placements)
