"""Hooks that a user has put on a model, and what checks of a model depend on.

A pass that leaves positions or layers out is exact for the loss, but a hook inside the model would
see the gaps: zeros at positions that are not read, states that a skipped layer lets pass.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from metafocus.adapters import slots
from metafocus.adapters.low_rank import update
from metafocus.lm.hf.heads import output_head
from metafocus.torch_internals import forward_hooks, has_backward_hooks

_BY_POSITION = (slots.as_parameters, update)
# Hooks of the first collect outputs on request, and no loss requests them; those of the second
# gather sharded weights.
_KNOWN = ("transformers.utils.output_capturing", "torch.distributed.")


def observed(model: nn.Module) -> bool:
    """Return whether something looks at the layers of a model, which must then run as a whole.

    That is any hook which is not this package's own, and fast weights of an adapter of the user,
    which may mix positions. The embeddings and the head always see what they would see.
    """
    ends = {id(model.get_input_embeddings()), id(output_head(model))}  # pyright: ignore
    return any(
        has_backward_hooks(module) or not all(map(_is_known, forward_hooks(module)))
        for module in model.modules()
        if id(module) not in ends
    )


def structure(model: nn.Module) -> tuple[Any, ...]:
    """Return what a model consists of: a check of the model holds as long as this stays equal.

    It keeps none of the modules alive.
    """
    return tuple(
        (weakref.ref(m), m.training, _weakly(vars(m).get("forward"))) for m in model.modules()
    )


def _weakly(forward: Any) -> Any:
    return None if forward is None else weakref.ref(forward)


def _is_known(hook: Any) -> bool:
    if isinstance(hook, slots.Slot):
        bound = hook.binding
        return bound is None or getattr(bound.apply, "func", bound.apply) in _BY_POSITION
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(_KNOWN)
