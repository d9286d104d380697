"""The head of a language model, given only the positions that carry loss.

The model runs as it always does, with its own wrappers (mixed precision, sharding, compilation);
a hook takes the hidden states that its head is about to see and lets it see one position instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from metafocus.adapters import slots
from metafocus.autodiff.recompute import recompute
from metafocus.calls import changed, holding
from metafocus.errors import ProblemError
from metafocus.lm.cross_entropy import IGNORED, LogitHead, entropies
from metafocus.lm.token_loss import token_loss
from metafocus.precision import wide
from metafocus.torch_internals import (
    forward_hooks,
    has_backward_hooks,
    is_batched,
    tracing,
)

Reader = Callable[[nn.Module, Tensor], Tensor]
"""`(head, hidden [B, S, D]) -> result`."""

_ROWS = 256


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that makes logits of the final hidden states."""
    return model.get_output_embeddings()  # pyright: ignore


class HeadHook:
    """A hook before a head: hands its input to a reader, which returns what the head gets to see.

    Installed once and then kept, as a slot is: a compiler does not see hooks that come and go. A
    copied or unpickled one is idle and empty.

    Attributes:
        reader: what the next hidden states go to, and what it returns goes to the head; or None.
        logit_heads: what was found to follow the head, by class of the model and what its
            configuration says; None where the head cannot be split off.
    """

    __slots__ = ("logit_heads", "reader")

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.logit_heads: dict[tuple[type[nn.Module], LogitHead], LogitHead | None] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the shortened input, or None, which leaves it as it is."""
        if self.reader is None:
            return None
        # The reader may call the head.
        reader, self.reader = self.reader, None
        return reader(module, args[0]), *args[1:]

    def __reduce__(self) -> tuple[type[HeadHook], tuple[()]]:
        return HeadHook, ()


def read_hidden(
    head: nn.Module, run: Callable[[], Any], reader: Reader = lambda head, hidden: hidden
) -> Tensor:
    """Return what `reader(head, hidden)` makes of the input of `head` while `run()` runs.

    By default that is the input itself. Inside the reader the head has the weights of this run,
    swapped ones included.

    Raises:
        ProblemError: if the head is not called.

    Example:
        >>> layer, head = nn.Linear(2, 3), nn.Linear(3, 9)
        >>> x = torch.ones(1, 4, 2)
        >>> read_hidden(head, lambda: head(layer(x))).shape
        torch.Size([1, 4, 3])
    """
    results: list[Tensor] = []

    def read(head: nn.Module, hidden: Tensor) -> Tensor:
        results.append(reader(head, hidden))
        return hidden[..., :1, :]

    with changed((install(head), "reader", read)):
        run()
    if not results:
        raise ProblemError(f"the model did not call its head, {type(head).__name__}.")
    return results[0]


def logits_of_rows(head: nn.Module, run: Callable[[], Any], rows: Tensor) -> Tensor:
    """Return the logits `[n, V]` of some positions, while `run()` runs the model.

    The head itself runs, with the hooks that gather its weights if it is sharded, and sees nothing
    but these positions, as with transformers' `logits_to_keep`.

    Example:
        >>> head, x = nn.Linear(2, 9), torch.ones(1, 4, 2)
        >>> logits_of_rows(head, lambda: head(x), torch.tensor([1, 3])).shape
        torch.Size([2, 9])
    """

    def select(head: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, rows)[None]

    with changed((install(head), "reader", select)):
        return run()[0]


def keeps_positions_apart(model: nn.Module) -> bool:
    """Return whether a model makes the logits of each position from its hidden state alone.

    Those with transformers' `logits_to_keep` do.
    """
    whole = getattr(model, "get_base_model", lambda: model)()
    return "logits_to_keep" in inspect.signature(whole.forward).parameters


def install(head: nn.Module) -> HeadHook:
    """Return the hook of a head, installed at the first call."""
    hook = find_hook(head)
    if hook is None:
        hook = HeadHook()
        # It runs before other hooks, so that what it sees can be given to the head again.
        head.register_forward_pre_hook(hook, prepend=True)
    return hook


def find_hook(head: nn.Module) -> HeadHook | None:
    """Return the hook of a head, if one is installed."""
    return next((hook for hook in forward_hooks(head) if isinstance(hook, HeadHook)), None)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, logit_head: LogitHead) -> Tensor:
    """Return the summed cross entropy of rows of final hidden states, in chunks of rows.

    A plain linear head is taken as its weight; any other, and one with fast weights, is called on
    one chunk after another, with recomputation.

    Args:
        head: the model's own.
        hidden: what the head would see, `[n, D]`.
        targets: `[n]`, -100 where a row is not scored.
        logit_head: what follows the head.
    """
    if is_plain(head):
        return token_loss(hidden, head.weight, targets, bias=head.bias, logit_head=logit_head)  # pyright: ignore
    parameters = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    functions = slots.functions(head)

    def loss(
        parameters: dict[str, Tensor], fast: dict[str, Tensor], rows: Tensor, targets: Tensor
    ) -> Tensor:
        with holding(head, parameters), slots.rebind(head, fast, functions):
            return entropies(logit_head(wide(head(rows))), targets)

    fast = slots.bound(head)
    parts = [
        recompute(loss, parameters, fast, rows, target)
        for rows, target in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.stack(parts).sum()


def is_plain(head: nn.Module) -> bool:
    """Return whether a head is no more than the product with its weight."""
    return (
        type_before_parametrizations(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)
        and "forward" not in vars(head)
        and all(isinstance(hook, slots.Slot | HeadHook) for hook in forward_hooks(head))
        and not has_backward_hooks(head)
        and not slots.functions(head)
    )


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
