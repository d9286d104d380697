"""What a function takes from its surroundings, so that a change of it can be seen."""

from __future__ import annotations

import functools
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.torch_internals import forward_hooks

LONG = 256
"""Containers with more entries are seen by identity and length only."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_INSTALLED = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to the same object only, which is kept alive so that its identity is not reused."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} object"


def closures_of(fn: Any) -> dict[str, Any]:
    """Return what a function reads besides its arguments, by name: `{"loss.scale": 0.5}`.

    Seen are closures, defaults, attributes of objects and of modules with the mode they are in,
    and the globals of code that is not installed as a package. Numbers count by value, tensors
    and other objects by identity and, for tensors, shape: not the values in them.

    Example:
        >>> scale = [0.5]
        >>> def make(scale):
        ...     return lambda x: scale[0] * x
        >>> [value for value in closures_of(make(scale)).values() if isinstance(value, float)]
        [0.5]
    """
    found: dict[str, Any] = {}
    for name, value in _walk(fn, getattr(fn, "__name__", type(fn).__name__), set()):
        # Two functions may have one name.
        while name in found:
            name += "'"
        found[name] = value
    return found


def _walk(x: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(x, _PLAIN):
        # NaN differs from itself, and True equals 1.
        yield name, repr(x) if isinstance(x, float | bool) and (x != x or x in (0, 1)) else x
        return
    if isinstance(x, Tensor):
        yield name, (_Same(x), x.shape, x.dtype, x.device)
        return
    if id(x) in seen or isinstance(x, types.ModuleType | type):
        return
    seen.add(id(x))
    if isinstance(x, list | tuple | set | frozenset | dict):
        yield f"len({name})", len(x)
        if len(x) > LONG:
            yield name, _Same(x)
            return
        entries = x.items() if isinstance(x, dict) else enumerate(x)
        for k, v in entries:
            yield from _walk(v, f"{name}[{k!r}]", seen)
    elif isinstance(x, types.FunctionType):
        yield from _function(x, name, seen)
    elif isinstance(x, types.MethodType):
        yield from _walk(x.__self__, name, seen)
        yield from _walk(x.__func__, f"{name}()", seen)
    elif isinstance(x, functools.partial):
        yield from _walk((x.func, x.args, x.keywords), name, seen)
    elif isinstance(x, nn.Module):
        for path, module in x.named_modules():
            yield from _module(module, f"{name}.{path}" if path else name)
    else:
        yield name, _Same(x)
        if not _foreign(type(x).__module__):
            for k, v in getattr(x, "__dict__", {}).items():
                yield from _walk(v, f"{name}.{k}", seen)
            call = vars(type(x)).get("__call__")
            yield from _walk(call, f"{name}()", seen)


def _function(fn: types.FunctionType, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield name, _Same(fn.__code__)
    for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        yield from _walk(value, f"{name}.{variable}", seen)
    yield from _walk(fn.__defaults__, f"{name} defaults", seen)
    yield from _walk(fn.__kwdefaults__, f"{name} defaults", seen)
    root = fn.__module__.partition(".")[0] if fn.__module__ else ""
    if root == "metafocus" or fn.__code__.co_filename.startswith(_INSTALLED):
        return
    for variable in _global_names(fn.__code__):
        if variable in fn.__globals__:
            yield from _walk(fn.__globals__[variable], variable, seen)


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_global_names(constant))
    return tuple(names)


def _module(module: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    yield name, _Same(module)
    for k, v in vars(module).items():
        if isinstance(v, _PLAIN):
            yield f"{name}.{k}", v
    own: dict[str, Any] = {"recurse": False, "remove_duplicate": False}
    for k, v in (*module.named_parameters(**own), *module.named_buffers(**own)):
        yield f"{name}.{k}", (_Same(v), v.shape, v.dtype, v.device)
    yield f"{name} hooks", tuple(map(_Same, forward_hooks(module)))


def _foreign(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "numpy")
