"""What a model does to the output of its head, read from its configuration and then measured."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafocus.calls import undone
from metafocus.lm.cross_entropy import LogitHead
from metafocus.lm.hf import heads
from metafocus.lm.hf.side_runs import few_tokens, side_run
from metafocus.precision import wide
from metafocus.sharding import HOOKED, sharding_of

_SCALES = (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1))
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


def from_config(config: Any) -> LogitHead:
    """Return what a configuration says that a model does to the output of its head."""
    scale = 1.0
    for name, power in _SCALES:
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value) ** power
    caps = [getattr(config, name, None) for name in _CAPS]
    return LogitHead(scale, next((float(cap) for cap in caps if cap), None))


def logit_head_of(model: nn.Module) -> LogitHead | None:
    """Return what follows the head of a model, or None if the head cannot be split off.

    What the configuration says is checked by one forward pass of a few tokens, once per model;
    a compiler that comes before that check, and a model without values, get None.

    Warns:
        UserWarning: once, with the class of the model and the reason, if it cannot.
    """
    head: nn.Module | None = heads.output_head(model)
    expected = from_config(model.config.get_text_config())  # pyright: ignore
    key = (type(model), expected)
    hook = None if head is None else heads.find_hook(head)
    if hook is not None and key in hook.logit_heads:
        return hook.logit_heads[key]
    weight = next(model.parameters())
    # The hooks of a sharded head do not run where its weight alone is used.
    if torch.compiler.is_compiling() or weight.is_meta or sharding_of(model) & HOOKED:
        return None
    found = measured(model, head, expected)
    logit_head = found if isinstance(found, LogitHead) else None
    if head is not None:
        heads.install(head).logit_heads[key] = logit_head
    if logit_head is None:
        warnings.warn(
            f"{type(model).__name__}: {found}. Logits are computed at all positions and not at "
            "the scored ones alone: correct, but slower and with more memory.",
            stacklevel=2,
        )
    return logit_head


def measured(model: nn.Module, head: nn.Module | None, expected: LogitHead) -> LogitHead | str:
    """Return what really follows the head of a model, or why it cannot be split off.

    One forward pass outside of all transforms and without a graph. The output of the head is
    replaced by evenly spaced values, so that what follows it shows, whatever the weights.

    Args:
        model: a causal language model.
        head: its output embeddings.
        expected: what its configuration says; that nothing follows is tried as well.
    """
    if head is None:
        return "get_output_embeddings() returns None"
    outputs: list[Tensor] = []
    replaced: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        values = torch.linspace(-200, 200, output.numel(), device=output.device)
        outputs.append(output)
        replaced.append(values.to(output.dtype).view(output.shape))
        return replaced[-1]

    with side_run(model):
        inputs = few_tokens(model)
        logits: list[Tensor] = []
        try:
            with undone(head.register_forward_hook(replace).remove):
                hidden = heads.read_hidden(head, lambda: logits.append(model(**inputs).logits))
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            return f"it cannot run with one position for its head ({error})"
        if len(outputs) != 1:
            return f"its head is called {len(outputs)} times in a forward pass"
        if hidden.ndim != 3 or hidden.shape[:-1] != inputs["input_ids"].shape:
            return f"its head takes {list(hidden.shape)} and not [batch, sequence, width]"
        if logits[0].shape != outputs[0].shape:
            return "its logits have another shape than the output of its head"
        rows = hidden[:, :1]
        again = F.linear(rows, head.weight, head.bias) if heads.is_plain(head) else head(rows)  # pyright: ignore
        size = outputs[0].abs().amax().item()
        if not size > 0 or not _agree(again / size, outputs[0] / size):
            return "its head gives zeros, or something else when it is called again"
        for logit_head in (expected, LogitHead()):
            if _agree(logit_head(wide(replaced[0])), logits[0]):
                return logit_head
    return f"its logits are neither {expected} of the output of its head nor that output"


def _agree(a: Tensor, b: Tensor) -> bool:
    # Tolerance: 8 ulp of the lower precision.
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return torch.allclose(a.double(), b.double(), rtol=8 * eps, atol=8 * eps)
