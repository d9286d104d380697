"""Hugging Face's activation checkpointing, made exact around swapped weights.

`torch.utils.checkpoint` recomputes a layer in the backward pass, when the swapped weights are
gone: the gradient is silently wrong. Here a checkpointed layer receives its current parameters,
its fast weights and its arguments as explicit tensors.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from metafocus.adapters import slots
from metafocus.autodiff.recompute import recompute
from metafocus.calls import changed, holding, using
from metafocus.lm.hf.attention import attention_as
from metafocus.lm.hf.restricted import active, restricted
from metafocus.params import is_differentiable


@contextlib.contextmanager
def exact_checkpointing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Route `gradient_checkpointing_enable()` of a model through `recompute` inside the block.

    The hook that makes embeddings require grad is lifted meanwhile: functorch refuses it, and
    explicit tensors do not need it. Everything is restored on exit. A model without
    checkpointing is left alone.

    Args:
        model: a Hugging Face model, with or without checkpointing enabled.
        enabled: False: nothing is checkpointed inside the block.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    ours = partial(checkpoint_layer, model)
    places: list[Any] = [(layer, "_gradient_checkpointing_func", ours) for layer in layers]
    # These are torch's wrappers, which accelerate's fsdp_config.activation_checkpointing makes.
    wrapped = partial(_checkpoint_wrapped, model)
    places += [(m, "checkpoint_fn", wrapped) for m in model.modules() if _is_wrapper(m)]
    if not enabled:
        places = [(layer, "gradient_checkpointing", False) for layer in layers]
    for hook in getattr(model, "_require_grads_hooks", None) or []:
        table = hook.hooks_dict_ref()
        if table is not None and hook.id in table:
            # The hook is replaced and not removed, so that hooks keep their order.
            places.append((table, hook.id, _nothing))
    with changed(*places):
        yield


def is_checkpointing(model: nn.Module) -> bool:
    """Return whether layers of a model checkpoint their activations."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _is_wrapper(module: nn.Module) -> bool:
    # Importing it takes long; a model can hold one only if it is imported already.
    home = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return home is not None and isinstance(module, home.CheckpointWrapper)


def _checkpoint_wrapped(model: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint_layer(model, partial(layer.__call__, **kwargs), *args)


def _nothing(*args: Any) -> None:
    """Do nothing: a hook in the place of another one."""


def checkpoint_layer(model: nn.Module, call: Any, *args: Any) -> Any:
    """Run a decoder layer with `recompute`; a checkpoint function for transformers.

    Args:
        model: the model that the layer belongs to.
        call: `partial(forward, layer, **kwargs)` (transformers 5.23), or a partial of the layer's
            own call (older).
        args: the positional arguments of the layer.
    """
    if call.args:
        return _recomputed(model, call.args[0], partial(call.func, *call.args), args, call.keywords)
    # The layer's hooks are part of this call. FSDP's gather the parameters, and must do so before
    # these are taken: only what is inside the hooks is recomputed.
    layer = call.func.__self__
    forward = layer.forward

    def inner(*args: Any, **kwargs: Any) -> Any:
        return _recomputed(model, layer, forward, args, kwargs)

    with changed((layer, "forward", inner)):
        return call(*args)


def _recomputed(model: nn.Module, layer: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    functions = slots.functions(layer)
    config = model.config.get_text_config()  # pyright: ignore
    implementation = config._attn_implementation
    # A layer inside a wrapper may checkpoint as well; once is enough.
    own = [(layer, "gradient_checkpointing", False)] * hasattr(layer, "gradient_checkpointing")
    rows = active()

    def run(parameters: dict[str, Tensor], fast: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        with (
            using(model),
            changed(*own),
            attention_as(config, implementation),
            restricted(rows),
            holding(layer, parameters),
            slots.rebind(layer, fast, functions),
        ):
            return forward(*args, **kwargs)

    # Quantised weights are constants, and their classes would be lost: they stay where they are.
    parameters = {k: p for k, p in layer.named_parameters() if is_differentiable(p)}
    return recompute(run, parameters, slots.bound(layer), args, kwargs)
