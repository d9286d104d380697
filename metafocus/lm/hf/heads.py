"""The head of a language model, given only the positions that carry loss.

The model runs as it always does, with its own wrappers (mixed precision, sharding, compilation);
a hook takes the hidden states that its head is about to see and lets it see one position instead.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafocus.adapters import slots
from metafocus.autodiff.recompute import recompute
from metafocus.errors import ProblemError
from metafocus.lm.hf.checkpointing import exact_checkpointing
from metafocus.lm.hf.chunk import IGNORED, Tail, entropies, wide
from metafocus.lm.token_loss import token_loss
from metafocus.torch_internals import (
    forward_hooks,
    has_backward_hooks,
    is_batched,
    outside_transforms,
    swapped_weights,
    tracing,
)

Reader = Callable[[nn.Module, Tensor], Tensor]
"""`(head, hidden [B, S, D]) -> result`."""

_ROWS = 256
_SCALES = (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1))
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


class Tap:
    """A hook before a head: hands its input to a reader, and one position of it to the head.

    Installed once and then kept, as a slot is: a compiler does not see hooks that come and go. A
    copied or unpickled tap is idle and knows nothing.

    Attributes:
        reader: what the next hidden states go to, or None.
        result: what it returned.
        tails: what was found to follow the head, by class of the model and what its
            configuration says; None where the head cannot be split off.
    """

    __slots__ = ("reader", "result", "tails")

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.result: Tensor | None = None
        self.tails: dict[tuple[type[nn.Module], Tail], Tail | None] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the shortened input, or None, which leaves it as it is."""
        if self.reader is None:
            return None
        # The reader may call the head.
        reader, self.reader = self.reader, None
        self.result = reader(module, args[0])
        return args[0][..., :1, :], *args[1:]

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


def read_hidden(head: nn.Module, run: Callable[[], Any], reader: Reader) -> Tensor:
    """Return what `reader(head, hidden)` makes of the input of `head` while `run()` runs.

    Inside the reader the head has the weights of this run, swapped ones included.

    Raises:
        ProblemError: if the head is not called.

    Example:
        >>> layer, head = nn.Linear(2, 3), nn.Linear(3, 9)
        >>> x = torch.ones(1, 4, 2)
        >>> read_hidden(head, lambda: head(layer(x)), lambda head, hidden: hidden).shape
        torch.Size([1, 4, 3])
    """
    tap = install(head)
    tap.reader, tap.result = reader, None
    try:
        run()
        if tap.result is None:
            raise ProblemError(f"the model did not call its head, {type(head).__name__}.")
        return tap.result
    finally:
        tap.reader = tap.result = None


def install(head: nn.Module) -> Tap:
    """Return the tap of a head, installed at the first call."""
    tap = _find(head)
    if tap is None:
        tap = Tap()
        # Before other hooks: what it sees can be given to the head again.
        head.register_forward_pre_hook(tap, prepend=True)
    return tap


def _find(head: nn.Module) -> Tap | None:
    return next((hook for hook in forward_hooks(head) if isinstance(hook, Tap)), None)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, tail: Tail) -> Tensor:
    """Return the summed cross entropy of rows of final hidden states, in chunks of rows.

    A plain linear head is taken as its weight; any other, and one with fast weights, is called on
    one chunk after another, with recomputation.

    Args:
        head: the model's own.
        hidden: what the head would see, `[n, D]`.
        targets: `[n]`, -100 where a row is not scored.
        tail: what follows the head.
    """
    if _is_plain(head):
        return token_loss(hidden, head.weight, targets, bias=head.bias, tail=tail)  # pyright: ignore
    parameters = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    functions = slots.functions(head)

    def loss(
        parameters: dict[str, Tensor], fast: dict[str, Tensor], rows: Tensor, targets: Tensor
    ) -> Tensor:
        with swapped_weights(head, parameters), slots.rebind(head, fast, functions):
            return entropies(tail(wide(head(rows))), targets)

    fast = slots.bound(head)
    parts = [
        recompute(loss, parameters, fast, rows, target)
        for rows, target in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.stack(parts).sum()


def _is_plain(head: nn.Module) -> bool:
    return (
        type(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)
        and "forward" not in vars(head)
        and all(isinstance(hook, slots.Slot | Tap) for hook in forward_hooks(head))
        and not has_backward_hooks(head)
        and not slots.functions(head)
    )


def tail_of(config: Any) -> Tail:
    """Return what a configuration says about the way from the head's output to the logits."""
    scale = 1.0
    for name, power in _SCALES:
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value) ** power
    caps = [getattr(config, name, None) for name in _CAPS]
    return Tail(scale, next((float(cap) for cap in caps if cap), None))


def tail_after(model: nn.Module, probe: Callable[[], dict[str, Any]]) -> Tail | None:
    """Return what follows the head of a model, or None if the head cannot be split off.

    What the configuration says is checked by one forward pass of a few tokens, once per model;
    a compiler that comes before that check, and a model without values, get None.

    Args:
        model: a Hugging Face causal language model.
        probe: makes inputs for it: `input_ids [1, T]` and more.

    Warns:
        UserWarning: once, with the class of the model and the reason, if it cannot.
    """
    head = model.get_output_embeddings()  # pyright: ignore
    told = tail_of(model.config.get_text_config())  # pyright: ignore
    key = (type(model), told)
    tap = None if head is None else _find(head)
    if tap is not None and key in tap.tails:
        return tap.tails[key]
    weight = next(model.parameters())
    # Sharded weights meet plain ones in the check.
    if torch.compiler.is_compiling() or weight.is_meta or hasattr(weight, "full_tensor"):
        return None
    found = checked_tail(model, head, told, probe())
    tail = found if isinstance(found, Tail) else None
    if head is not None:
        install(head).tails[key] = tail
    if tail is None:
        warnings.warn(
            f"{type(model).__name__}: {found}. Logits are computed at all positions and not at "
            "the scored ones alone: correct, but slower and with more memory.",
            stacklevel=2,
        )
    return tail


def checked_tail(
    model: nn.Module, head: nn.Module | None, told: Tail, inputs: dict[str, Any]
) -> Tail | str:
    """Return the tail that a model really has, or why its head cannot be split off.

    One forward pass outside of all transforms and without a graph. The output of the head is
    replaced by a ladder of values, so that what follows it shows, whatever the weights.

    Args:
        model: a causal language model.
        head: its output embeddings.
        told: what its configuration says; a plain tail is tried as well.
        inputs: of the model: `input_ids [1, T]` and more.
    """
    if head is None:
        return "get_output_embeddings() returns None"
    outputs: list[Tensor] = []
    ladders: list[Tensor] = []

    def climb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        steps = torch.linspace(-200, 200, output.numel(), device=output.device)
        outputs.append(output)
        ladders.append(steps.to(output.dtype).view(output.shape))
        return ladders[-1]

    with bystander(model):
        handle = head.register_forward_hook(climb)
        logits: list[Tensor] = []
        try:
            hidden = read_hidden(
                head, lambda: logits.append(model(**inputs).logits), lambda head, hidden: hidden
            )
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            return f"it cannot run with one position for its head ({error})"
        finally:
            handle.remove()
        if len(outputs) != 1:
            return f"its head is called {len(outputs)} times in a forward pass"
        if hidden.ndim != 3 or hidden.shape[:-1] != inputs["input_ids"].shape:
            return f"its head takes {list(hidden.shape)} and not [batch, sequence, width]"
        if logits[0].shape != outputs[0].shape:
            return "its logits have another shape than the output of its head"
        rows = hidden[:, :1]
        again = F.linear(rows, head.weight, head.bias) if _is_plain(head) else head(rows)  # pyright: ignore
        size = outputs[0].abs().amax().item()
        if not size > 0 or not _agree(again / size, outputs[0] / size):
            return "its head gives zeros, or something else when it is called again"
        for tail in (told, Tail()):
            if _agree(tail(wide(ladders[0])), logits[0]):
                return tail
    return f"its logits are neither {told} of the output of its head nor that output"


def _agree(a: Tensor, b: Tensor) -> bool:
    # A few roundings in the narrower of the two types.
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return torch.allclose(a.double(), b.double(), rtol=8 * eps, atol=8 * eps)


@contextlib.contextmanager
def bystander(model: nn.Module) -> Iterator[None]:
    """Run a model on the side: no transforms, no graph, and the random state given back."""
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with contextlib.ExitStack() as stack:
        stack.enter_context(outside_transforms())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact_checkpointing(model))
        yield


def scored_rows(targets: Tensor) -> Tensor | None:
    """Return the flat indices of targets that are not -100; None where that cannot be asked.

    Inside `vmap` and while compiling shapes may not depend on values.

    Example:
        >>> scored_rows(torch.tensor([[-100, 3], [5, -100]]))
        tensor([1, 2])
    """
    if tracing() or targets.is_meta or is_batched(targets):
        return None
    return (targets.flatten() != IGNORED).nonzero().squeeze(-1)
