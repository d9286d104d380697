"""Tasks that several ranks share: one mean over all of them, and its gradient on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.tape import foreign_leaves
from metafocus.engine import MetaLoss
from metafocus.errors import ProblemError
from metafocus.parallel.collectives import Group, replicated_together, share_of_tasks, summed
from metafocus.problem import is_frozen
from metafocus.sharding import refuse_sharded_outer
from metafocus.torch_internals import transforming
from metafocus.types import Params


def over_ranks(mean: MetaLoss, group: Group) -> MetaLoss:
    """Return the mean over the tasks of all ranks, from that over this rank's tasks."""
    if group is None:
        return mean

    def shared(outer: Params, episodes: Any) -> tuple[Tensor, Any]:
        refuse_sharded_outer(outer)
        tensors, _ = pt.partition(episodes)
        share = share_of_tasks(len(tensors[0]) if tensors and tensors[0].ndim else 0, group)
        # A frozen parameter is known by its type; whole numbers have no gradient.
        moving = [k for k, v in outer.items() if not is_frozen(v) and pt.is_differentiable(v)]
        entering, zero = replicated_together([outer[k] for k in moving], group)
        loss, aux = mean({**outer, **dict(zip(moving, entering, strict=True))}, episodes)
        if not transforming():
            _refuse_others(loss, [*outer.values(), *tensors])
        return summed(share * loss + zero.to(loss.dtype), group), aux

    return shared


def _refuse_others(loss: Tensor, known: list[Tensor]) -> None:
    """Raise for a tensor that no rank would sum the gradient of: it is in no argument."""
    own = list(_leaves(known))
    for leaf in foreign_leaves(loss, own):
        if not hasattr(leaf, "engine_leaf"):
            raise ProblemError(
                f"the meta loss depends on a tensor of shape {list(leaf.shape)} that requires grad "
                "and is neither in outer nor in the episodes: over_tasks(group=...) would give it "
                "the gradient of this rank's tasks alone. Pass it in outer, such as "
                "outer=mf.trainable(model), or detach it."
            )


def _leaves(tensors: list[Tensor]) -> Iterator[Tensor]:
    for x in tensors:
        if x.requires_grad:
            yield from foreign_leaves(x, ())
