"""Placements: functions from a model to the module paths that get fast weights."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from metafocus.checks import is_number
from metafocus.errors import PlacementError

Placement = Callable[[nn.Module], tuple[str, ...]]
"""`model -> module paths`, in model order."""


def is_conv1d(module: nn.Module) -> bool:
    """Return whether `module` is transformers' `Conv1D`, a linear layer with weight `[in, out]`.

    Example:
        >>> is_conv1d(nn.Conv1d(1, 1, 1))
        False
    """
    # Importing it here would take seconds. A model can hold one only if it is imported already.
    source = sys.modules.get("transformers.pytorch_utils")
    return source is not None and isinstance(module, source.Conv1D)


def adaptable(module: nn.Module) -> bool:
    """Return whether `module` is linear in its last dimension and is called in a forward pass.

    This is True for `nn.Linear` and transformers' `Conv1D`. It is False for the projection inside
    `nn.MultiheadAttention`, whose weight is used without calling the module, and for routers of
    experts.

    Example:
        >>> adaptable(nn.Linear(2, 3)), adaptable(nn.LayerNorm(2))
        (True, False)
    """
    linear = isinstance(module, nn.Linear) and not isinstance(
        module, NonDynamicallyQuantizableLinear
    )
    # A router of experts may be a linear layer that returns several tensors.
    return (linear and "Router" not in type(module).__name__) or is_conv1d(module)


def read_directly(model: nn.Module, path: str) -> bool:
    """Return whether the forward pass of its parent may use a module's weight without calling it.

    Mamba's layers do this with their projections, in fused kernels or always. Hooks of the module
    would have no effect there. Some adapters of PEFT do it with the layer that they wrap (HRA and
    SHiRA multiply by a weight that they make of its weight, DoRA divides by its norm).

    Example:
        >>> read_directly(nn.Sequential(nn.Linear(2, 2)), "0")
        False
    """
    if torch.compiler.is_compiling():
        # Sources cannot be read there; the fast weights were made before.
        return False
    home, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(home)
    dora = name == "base_layer" and any(dict(getattr(parent, "use_dora", {})).values())
    return dora or name in _weights_read_by(type(parent))


@cache
def _weights_read_by(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        # The layers of torch call no children, and sources of other libraries are not read.
        if not base.__module__.startswith(("transformers.models.", "peft.tuners.")):
            continue
        for name, method in vars(base).items():
            if "forward" in name and callable(method):
                try:
                    source = inspect.getsource(inspect.unwrap(method))
                except (OSError, TypeError):
                    continue
                found.update(_WEIGHT.findall(source))
                if _BASE.search(source):
                    found.add("base_layer")
    return frozenset(found)


# This leaves out code that reads only a property of the weight.
_PROPERTY = r"(?!\.(?:data\.)?(?:dtype|device|shape|size|ndim|requires_grad|is_\w+))"
_WEIGHT = re.compile(rf"self\.(\w+)\.weight\b{_PROPERTY}")
# How the layers of PEFT read the weight of the layer that they wrap.
_BASE = re.compile(rf"self\.get_base_(?:weight\(\)|layer\(\)\.weight\b{_PROPERTY})")


@dataclass(frozen=True)
class top_layers:
    """Places the modules called `names` in the last layers of a model.

    Of `n` layers these are the layers `floor(n * (1 - fraction) + 1e-9)` to `n - 1`. The layers are
    the outermost `nn.ModuleList` on the path of the modules that `names` match.

    Args:
        fraction: The share of the layers, counted from the output, in [0, 1]; 0 places nothing.
        names: The last components of module paths, such as `"gate_proj"` or `"mlp.gate_proj"`.

    Raises:
        PlacementError: At construction, if the fraction is outside [0, 1] or there are no names.
            At the call, if a name matches no module, or if the matches are in more than one list of
            layers.

    Example:
        >>> layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(4))
        >>> top_layers(0.5, ("up",))(nn.ModuleDict({"layers": layers}))
        ('layers.2.up', 'layers.3.up')

    References:
        This is the rule of the official FocuSFT code, without its float error at fractions such
        as 0.2.
    """

    fraction: float
    names: Sequence[str]

    def __post_init__(self) -> None:
        if not is_number(self.fraction) or not 0 <= self.fraction <= 1:
            raise PlacementError(
                f"top_layers(fraction={self.fraction!r}) must lie in [0, 1]: it is the share of "
                "layers, not their number"
            )
        if isinstance(self.names, str) or not self.names:
            raise PlacementError(
                f"top_layers(names={self.names!r}) must be a non-empty tuple of module names, "
                "such as ('gate_proj', 'up_proj')"
            )
        object.__setattr__(self, "names", tuple(self.names))

    def __call__(self, model: nn.Module) -> tuple[str, ...]:
        """Return the module paths in `model`."""
        if self.fraction == 0:
            return ()
        modules = dict(model.named_modules())
        found: list[tuple[str, int, str]] = []
        unmatched = set(self.names)
        for path in modules:
            hits = {name for name in self.names if f".{path}".endswith(f".{name}")}
            place = layer_of(path, modules) if hits else None
            if place is not None:
                found.append((*place, path))
                unmatched -= hits
        if unmatched:
            known = _linear_names(modules) or _examples(modules)
            raise PlacementError(
                f"top_layers: no module in a layer of {type(model).__name__} is named "
                f"{sorted(unmatched)}; its linear modules are {known}{_instead(modules)}"
            )
        lists = list(dict.fromkeys(home for home, _, _ in found))
        if len(lists) > 1:
            raise PlacementError(
                f"top_layers: {list(self.names)} match modules in several lists of layers, "
                f"{lists}; choose one with matching(), such as "
                f"matching(r'{re.escape(lists[0])}\\..*\\.{re.escape(self.names[0])}')"
            )
        layers = modules[lists[0]]
        assert isinstance(layers, nn.ModuleList)
        count = len(layers)
        # 1 - 0.8 is 0.19999999999999996 in floating point, so add a little before rounding down.
        first = math.floor(count * (1 - self.fraction) + 1e-9)
        chosen = tuple(path for _, layer, path in found if layer >= first)
        if not chosen:
            raise PlacementError(
                f"top_layers: {list(self.names)} match no module in layers {first} to {count - 1} "
                f"of {lists[0]!r}; they match in layers {sorted({i for _, i, _ in found})}"
            )
        return chosen


@dataclass(frozen=True)
class matching:
    """Places every linear module whose whole path matches a regular expression.

    Args:
        pattern: The expression. `re.fullmatch` compares it with paths such as
            `"model.layers.3.mlp.up_proj"`.

    Raises:
        PlacementError: At construction, if the pattern is not a regular expression. At the call, if
            nothing matches.

    Example:
        >>> matching("[01]")(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
        ('0',)
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise PlacementError(
                f"matching({self.pattern!r}) is not a regular expression: {error}"
            ) from error

    def __call__(self, model: nn.Module) -> tuple[str, ...]:
        """Return the module paths in `model`."""
        modules = dict(model.named_modules())
        rule = re.compile(self.pattern)
        chosen = tuple(
            path for path, module in modules.items() if adaptable(module) and rule.fullmatch(path)
        )
        if not chosen:
            raise PlacementError(
                f"matching({self.pattern!r}) matches the whole path of no linear module of "
                f"{type(model).__name__}; paths are like {_examples(modules)}"
            )
        return chosen


def all_linear(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of all linear modules except the output head.

    Args:
        model: The model. `get_output_embeddings()` returns its head, if it has this method.

    Returns:
        Module paths in model order.

    Raises:
        PlacementError: If there are no such modules.

    Example:
        >>> all_linear(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
        ('0', '2')
    """
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    chosen = tuple(
        path
        for path, module in model.named_modules()
        if adaptable(module) and module is not head and not read_directly(model, path)
    )
    if not chosen:
        raise PlacementError(
            f"all_linear: {type(model).__name__} has no linear module besides its output head"
        )
    return chosen


def layer_of(path: str, modules: dict[str, nn.Module]) -> tuple[str, int] | None:
    """Return the outermost list of layers around a module, and the index of its layer."""
    parts = path.split(".")
    for depth in range(len(parts) - 1):
        home = ".".join(parts[:depth])
        if isinstance(modules.get(home), nn.ModuleList):
            return home, int(parts[depth])
    return None


def _linear_names(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the linear modules in lists of layers, relative to their layer."""
    names: dict[str, None] = {}
    for path, module in modules.items():
        place = layer_of(path, modules) if adaptable(module) else None
        if place is not None:
            home, index = place
            names[path.removeprefix(f"{home}.{index}.".lstrip("."))] = None
    return list(names)


def _instead(modules: dict[str, nn.Module]) -> str:
    """Return which names to give for the feed-forward layers, if some are recognised."""
    names = [name for name in _linear_names(modules) if _FEED_FORWARD.search(f".{name}")]
    ends = [name.rpartition(".")[2] for name in names]
    every = [name.rpartition(".")[2] for name in _linear_names(modules)]
    # A last component that attention has, too, needs the name before it.
    chosen = [e if every.count(e) == 1 else n for n, e in zip(names, ends, strict=True)]
    if not chosen:
        return ""
    tuple_ = ", ".join(map(repr, chosen))
    return (
        f". Name those of the feed-forward layers: ({tuple_}), or --lora_modules {','.join(chosen)}"
    )


_FEED_FORWARD = re.compile(r"\.(mlp|ffn|feed_forward|fc\d|fc_in|fc_out|intermediate|output)\b")


def _examples(modules: dict[str, nn.Module]) -> list[str]:
    return [path for path, module in modules.items() if adaptable(module)][:5]
