"""How a model's weights and tokens are spread over processes, read from its modules."""

from __future__ import annotations

import enum
import sys
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from metafocus.errors import ProblemError
from metafocus.torch_internals import is_wrapper, runs_beside_ddp

ULYSSES = "metafocus_ulysses"
"""The attention implementation of a model whose sequences are split over processes."""


class Sharding(enum.Flag):
    """What of a model is spread over processes; several may hold at once, `NONE` alone is false.

    Attributes:
        NONE: nothing is; DDP wraps such a model.
        FSDP2: `fully_shard`, accelerate's or one's own, gathers weights by hooks.
        PARAMETRISED: `metafocus.trainer.distributed.parametrise` gathers them by parametrization.
        TP: tensor parallel: linear layers compute on a part of their features.
        DTENSOR: parameters are DTensors for another reason.
        SEQUENCE_PARALLEL: each process holds a part of the tokens.
    """

    NONE = 0
    FSDP2 = enum.auto()
    PARAMETRISED = enum.auto()
    TP = enum.auto()
    DTENSOR = enum.auto()
    SEQUENCE_PARALLEL = enum.auto()


HOOKED = Sharding.FSDP2 | Sharding.TP | Sharding.DTENSOR
"""Weights that are whole, if ever, only while the hooks of their modules let them be."""


class Gathers(nn.Module):
    """The base of the parametrization that `parametrise` registers, by which it is recognised.

    A model may have parametrizations of its own, such as `weight_norm`.
    """


def sharding_of(model: nn.Module) -> Sharding:
    """Return how a model is sharded, from the types of its modules, its meshes and its settings.

    The type of a parameter alone does not say it: FSDP2 puts whole parameters in the place of
    sharded ones while a module runs, and after it if it does not reshard.

    Example:
        >>> sharding_of(nn.Linear(2, 2))
        <Sharding.NONE: 0>
        >>> Sharding.FSDP2 in sharding_of(nn.Linear(2, 2))
        False
    """
    found = Sharding.NONE
    if any(_is_fsdp2(module) for module in model.modules()):
        found |= Sharding.FSDP2
    wrapped = {name: p for name, p in model.named_parameters() if hasattr(p, "device_mesh")}
    gathered = plain_names(model).keys()
    if gathered:
        found |= Sharding.PARAMETRISED
    if _tensor_parallel(model) or any(_names_tp(p) for p in wrapped.values()):
        found |= Sharding.TP
    if wrapped.keys() - gathered and not found & (Sharding.FSDP2 | Sharding.TP):
        found |= Sharding.DTENSOR
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == ULYSSES:
        found |= Sharding.SEQUENCE_PARALLEL
    return found


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class that a model had before `fully_shard` gave it one of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = type(model).__mro__
    return next(k for k in kinds if fsdp is None or not issubclass(k, fsdp.FSDPModule))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return, by its present name, the name that each parameter had before `parametrise`.

    Example:
        >>> plain_names(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        {}
    """
    return {
        f"{path}.original": "".join(path.rsplit("parametrizations.", 1))
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ParametrizationList) and isinstance(module[0], Gathers)
    }


def _is_part(name: str, value: Any) -> bool:
    """Return whether an outer parameter is this process's part of a parametrised weight."""
    ours = "parametrizations." in name and name.endswith(".original")
    return ours and is_wrapper(value)


def refuse_parts(fast: dict[str, Any], outer: dict[str, Any]) -> None:
    """Raise for fast weights that are parts of sharded weights.

    An inner gradient of them would be a mean over processes, of which each has its own task.
    """
    for name in fast:
        if _is_part(name, outer.get(name)):
            raise ProblemError(
                f"the fast weight {name!r} is a part of a weight that parametrise has sharded: its "
                "gradient would mix the tasks of all processes. Use fast weights of their own "
                "(mf.LoRA, or an init that returns whole tensors), or DDP, where weights are whole."
            )


def refuse_mixed(who: str, fast: dict[str, Any], error: Exception) -> None:
    """Raise for sharded fast weights, with which torch mixes no whole tensors."""
    for name, value in fast.items():
        if is_wrapper(value):
            raise ProblemError(
                f"{who} failed, and the fast weight {name!r} is a {type(value).__name__}: use "
                "FirstOrder(), or Unrolled() or Implicit() with hvp=mf.hvp_reverse, or fast "
                f"weights that each process holds whole. The failure: {error}"
            ) from error


def refuse_sharded_outer(outer: dict[str, Any]) -> None:
    """Raise for outer parameters that each process holds a part of."""
    found = [name for name, value in outer.items() if is_wrapper(value)]
    if found:
        raise ProblemError(
            f"the outer parameter {found[0]!r} is sharded over processes, and its gradient is a "
            "mean over them already: over_tasks(group=...) is for weights that each process holds "
            "whole. Leave group out, and give each process the same number of tasks."
        )


def refuse_bare_ddp(outer: dict[str, Any]) -> None:
    """Raise if parameters belong to a DDP wrapper whose forward pass is not running.

    DDP reduces gradients for a backward pass only if it has seen the forward pass. On its module
    alone each process would train a model of its own, without an error.
    """
    leaves = [value for value in outer.values() if isinstance(value, nn.Parameter)]
    if leaves and runs_beside_ddp(leaves):
        raise ProblemError(
            "outer holds parameters of a DistributedDataParallel model, and its forward pass is "
            "not running: DDP would not average their gradients. Call "
            "metafocus.trainer.distributed.through(ddp, lambda episode: meta(outer, episode)[0], "
            "episode); or do not wrap the model, and pass mf.over_tasks(meta, group=...) or reduce "
            "the result of mf.hypergrad."
        )


def local_parts(outer: dict[str, Any]) -> dict[str, Any]:
    """Return the weights that `parametrise` has sharded as plain tensors, this process's part.

    A derivative goes back to the sharded weights. Everything else comes back as it is. Inside the
    engine all tensors are then plain, whatever transform is active.
    """
    return {
        name: value.to_local() if _is_part(name, value) else value for name, value in outer.items()
    }


def _is_fsdp2(module: nn.Module) -> bool:
    # Importing it takes long; a model can hold one only if it is imported already.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _tensor_parallel(model: nn.Module) -> bool:
    """Return whether transformers has loaded a model tensor parallel."""
    return (getattr(model, "tp_size", None) or 1) > 1


def _names_tp(parameter: Any) -> bool:
    return "tp" in (parameter.device_mesh.mesh_dim_names or ())
