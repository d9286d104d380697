"""Running a decoder in two parts: the layers below a certain one, and the rest from there.

The model runs its own `forward` both times; layers of the other part let their input pass. So
embeddings, position embeddings, masks of each kind of layer and whatever else a model does around
its layers stay its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafocus.adapters.placement import layer_of
from metafocus.calls import changed
from metafocus.errors import ProblemError
from metafocus.sharding import Sharding, sharding_of
from metafocus.torch_internals import child_table, is_compiled

_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Hidden(NamedTuple):
    """The hidden states between two layers.

    Attributes:
        states: The input of the layer, `[B, S, D]`.
        home: Path of the list of layers.
        first: Index of the layer.
        others: For a check: what the skipped layers return; None: their input.
    """

    states: Tensor
    home: str
    first: int
    others: float | None = None


def fast_layers(model: nn.Module, names: Iterable[str]) -> tuple[str, int] | None:
    """Return the list of layers that all fast weights lie in, and the first index with one.

    Args:
        model: The model.
        names: The names of the fast weights: module paths, with the name of the weight.

    Returns:
        `(path, index)`; None without fast weights, or if one lies elsewhere.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> fast_layers(model, ["layers.1.lora_A"])
        ('layers', 1)
    """
    modules = dict(model.named_modules())
    places = [layer_of(name, modules) for name in names]
    found = [place for place in places if place is not None]
    if not found or len(found) < len(places) or len({home for home, _ in found}) > 1:
        return None
    return min(found)


def hidden_before(model: nn.Module, home: str, first: int, run: Callable[[], Any]) -> Hidden:
    """Return the input of layer `first` while `run()` runs the model, without the later layers.

    Raises:
        ProblemError: If the layer is not called.
    """
    seen: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        seen.append(states)
        return states

    layers = model.get_submodule(home)
    with _instead(layers, slice(first, first + 1), keep), _instead(layers, slice(first + 1, None)):
        run()
    if not seen:
        raise ProblemError(f"{type(model).__name__} did not call its layer {home}.{first}.")
    return Hidden(seen[0], home, first)


@contextlib.contextmanager
def resumed(model: nn.Module, hidden: Hidden | None) -> Iterator[None]:
    """Let a model start from hidden states inside a `with` block; from its input, if None.

    Args:
        model: The model.
        hidden: What `hidden_before` returned, with `first` at least 1.
    """
    if hidden is None:
        yield
        return
    layers, last, others = model.get_submodule(hidden.home), hidden.first - 1, hidden.others
    skip = _pass if others is None else partial(torch.full_like, fill_value=others)
    with (
        _instead(layers, slice(last), skip),
        _instead(layers, slice(last, last + 1), lambda _: hidden.states),
    ):
        yield


def draws_random_numbers(model: nn.Module) -> bool:
    """Return whether layers draw random numbers, of which each pass must have its own."""
    training = [m for m in model.modules() if m.training]
    if any(m.p for m in training if isinstance(m, _DROPOUT)):  # pyright: ignore
        return True
    if not training:
        return False
    # Some layers call the function and keep its rate in the configuration.
    config = vars(model.config.get_text_config())  # pyright: ignore
    rates = [v for k, v in config.items() if "drop" in k or "jitter" in k]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def has_own_call(model: nn.Module) -> bool:
    """Return whether layers are compiled: then their own call must stay."""
    return any(is_compiled(m) for m in model.modules())


def _pass(states: Tensor) -> Tensor:
    return states


class _StandIn(nn.Module):
    """Takes the place of a layer in its list, and has all other attributes of the layer."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor]):
        super().__init__()
        # The tuple keeps the layer from being a child of this module.
        self.layer = (layer,)
        self.function = function

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(hidden_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"][0], name)


@contextlib.contextmanager
def _instead(
    home: nn.Module, chosen: slice, function: Callable[[Tensor], Tensor] = _pass
) -> Iterator[None]:
    """Let layers do this to their first argument, and nothing else, inside the block."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(hidden_states)

    layers = list(home.children())[chosen]
    if not torch.compiler.is_compiling() and Sharding.FSDP2 in sharding_of(home):
        # The hooks of a sharded layer would gather weights that are not used.
        table = child_table(home)
        names = list(table)[chosen]
        others = [_StandIn(layer, function) for layer in layers]
        with changed(*((table, name, x) for name, x in zip(names, others, strict=True))):
            yield
        return
    places: list[Any] = [(layer, "forward", forward) for layer in layers]
    # Skipped layers have nothing to recompute.
    flagged = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    places += [(layer, "gradient_checkpointing", False) for layer in flagged]
    with changed(*places):
        yield
