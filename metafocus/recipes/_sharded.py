"""What works on a model whose weights are whole only while its modules run."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafocus.errors import ProblemError
from metafocus.path import name_of
from metafocus.sharding import HOOKED, Sharding, class_of, sharding_of
from metafocus.torch_internals import keeps_gathered
from metafocus.types import Params

_WAY_OUT = (
    "Every estimator works on metafocus.trainer.distributed.parametrise(model, mesh) in the place "
    "of fully_shard, in the Trainer by --sharding parametrised instead of --fsdp"
)


def hooked(model: nn.Module) -> bool:
    """Return whether hooks gather the weights: a loss reads them there and cannot be given them."""
    return bool(sharding_of(model) & HOOKED)


def refuse_sharded(model: nn.Module, estimator: Any) -> None:
    """Raise if an estimator cannot work with how a model is sharded.

    Raises:
        ProblemError: naming the estimator, the sharding and the way out.
    """
    found, kind = sharding_of(model), class_of(model).__name__
    if Sharding.TP in found:
        raise ProblemError(
            f"{kind} is tensor parallel (tp_plan, tp_size): its linear layers hold "
            "a part of their features, and fast weights of the whole layer do not fit. Load it "
            f"without tp_plan. {_WAY_OUT}."
        )
    if Sharding.DTENSOR in found:
        raise ProblemError(
            f"the parameters of {kind} are DTensors, and neither fully_shard nor "
            f"parametrise has made them: nothing says where they are gathered. {_WAY_OUT}."
        )
    if Sharding.FSDP2 not in found:
        return
    # The Trainer wraps the estimator that was asked for.
    name = name_of(getattr(estimator, "estimator", estimator))
    if getattr(estimator, "explicit", False):
        raise ProblemError(
            f"estimator {name} differentiates explicit tensors, and FSDP2 (fully_shard) gathers "
            f"the weights of {kind} inside its modules. {_WAY_OUT}; "
            "mf.FirstOrder() works under FSDP2."
        )
    if getattr(estimator, "twice", True) and not keeps_gathered(model):
        raise ProblemError(
            f"estimator {name} differentiates a backward pass, and FSDP2 (fully_shard) frees the "
            f"weights of {kind} before that. {_WAY_OUT}; or shard every module "
            "with reshard_after_forward=False, call model.set_reshard_after_backward(False), and "
            "reshard() on every module after the backward pass. mf.FirstOrder() works under FSDP2."
        )


def refuse_outer(outer: Params) -> None:
    """Raise for explicit outer parameters of a model whose hooks gather them."""
    if outer:
        raise ProblemError(
            f"outer holds {next(iter(outer))!r} and {len(outer) - 1} more weights, and the hooks "
            "of FSDP2 would put the model's own in their place: pass outer={} and call "
            "loss.backward(), which fills the .grad of the sharded parameters."
        )
