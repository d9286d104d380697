"""What a function takes from its surroundings, so that a change of it can be seen."""

from __future__ import annotations

import collections
import functools
import io
import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.closures.reads import attribute_names, global_names, is_installed, is_own_package
from metafocus.torch_internals import plain_attributes

LONG = 1024
"""Containers with more entries are compared entry by entry, but not looked into."""

LARGE = 2**20
"""Arrays of more bytes are not looked into."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, range)
_CONTAINERS = (list, tuple, set, frozenset, dict, collections.deque)
_OPAQUE = ("builtins", "numpy", "logging", "threading", "abc", "typing", "torch.utils.data")
_MADE_BY_PYTHON = frozenset(vars(type("", (), {}))) | {
    *("__annotations__", "__dataclass_fields__"),
    # Python 3.14 makes annotations when they are first read, and keeps them.
    *("__annotate_func__", "__annotations_cache__", "__conditional_annotations__"),
}


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to the same object only, which is kept alive so that its identity is not reused."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} object"


class Unseen(_Same):
    """An object that may change without being noticed."""


class _Entries(_Same):
    """Equal to as many of the same entries."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Entries) or len(self.value) != len(other.value):
            return False
        return all(map(operator.is_, self.value, other.value))

    __hash__ = _Same.__hash__


def closures_of(fn: Any) -> dict[str, Any]:
    """Return what a function reads besides its arguments, by name: `{"loss.scale": ...}`.

    Seen are closures, defaults, attributes of objects, of classes and of modules with the mode they
    are in, and what code that is not installed as a package names: globals, and attributes of
    modules of that kind. Numbers count by value, tensors and other objects by identity and, for
    tensors, shape: not the values in them. What cannot be watched is an `Unseen`.

    Example:
        >>> scale = [0.5]
        >>> def make(scale):
        ...     return lambda x: scale[0] * x
        >>> before = closures_of(make(scale))
        >>> scale[0] = 0.25
        >>> [name for name, value in closures_of(make(scale)).items() if value != before[name]]
        ['<lambda>.scale[0]']
    """
    walk = _Walk()
    walk.see(fn, getattr(fn, "__name__", type(fn).__name__))
    return walk.found


class _Walk:
    """One walk from a function to all that it reaches.

    Attributes:
        found: what was seen, by name.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        # With the objects: a temporary one would leave its number to another.
        self._seen: dict[Any, Any] = {}

    def see(self, x: Any, name: str, *, mine: bool = True) -> None:
        """Note an object and what it holds; `mine`: no installed package keeps it to itself."""
        if isinstance(x, _PLAIN):
            self._note(name, _value(x))
        elif isinstance(x, Tensor):
            self._note(name, (_Same(x), x.shape, x.dtype, x.device, x.requires_grad))
        elif self._is_new(x):
            if isinstance(x, type):
                self._class(x, name)
            elif isinstance(x, _CONTAINERS):
                self._container(x, name, mine)
            elif isinstance(x, types.FunctionType):
                self._function(x, name, mine)
            elif isinstance(x, types.MethodType):
                self.see(x.__self__, name, mine=mine)
                self.see(x.__func__, f"{name}()", mine=mine)
            elif isinstance(x, functools.partial):
                self.see((x.func, x.args, x.keywords), name, mine=mine)
            elif isinstance(x, nn.Module):
                self._network(x, name, mine)
            elif not isinstance(x, types.ModuleType):
                self._object(x, name, mine)

    def _is_new(self, x: Any) -> bool:
        new = id(x) not in self._seen
        self._seen[id(x)] = x
        return new

    def _note(self, name: str, value: Any) -> None:
        # Two functions may have one name.
        while name in self.found:
            name += "'"
        self.found[name] = value

    def _container(self, x: Any, name: str, mine: bool) -> None:
        if type(x) not in _CONTAINERS:
            self._attributes(x, name, mine)
        if not x:
            return
        self._note(f"len({name})", len(x))
        keys, values = (x.keys(), tuple(x.values())) if isinstance(x, dict) else ((), tuple(x))
        if len(x) > LONG:
            fixed = all(isinstance(v, (*_PLAIN, Tensor)) for v in values)
            self._note(name, _Entries((*keys, *values)) if fixed or not mine else Unseen(x))
        else:
            for k, v in zip(keys or range(len(x)), values, strict=True):
                key = repr(k) if isinstance(k, _PLAIN) else "..."
                self.see(v, f"{name}[{key}]", mine=mine)

    def _function(self, fn: types.FunctionType, name: str, mine: bool) -> None:
        self._note(name, _Same(fn.__code__))
        read: list[tuple[str, Any]] = []
        for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                read.append((f"{name}.{variable}", cell.cell_contents))
            except ValueError:
                continue
        installed = is_installed(fn.__module__, fn.__code__.co_filename)
        mine = mine and not installed
        for label, value in read:
            self._named(value, label, mine)
        for given in (fn.__defaults__, fn.__kwdefaults__):
            self.see(given, f"{name} defaults", mine=mine)
        self.see(vars(fn), name, mine=mine)
        if installed or is_own_package(fn.__module__):
            return
        attributes = attribute_names(fn.__code__)
        for variable in global_names(fn.__code__):
            if variable in fn.__globals__:
                value = fn.__globals__[variable]
                if isinstance(value, types.ModuleType):
                    self._python_module(value, variable, attributes)
                else:
                    self._named(value, variable, mine)

    def _named(self, x: Any, name: str, mine: bool) -> None:
        """See what code names; the next value of an iterator cannot be known."""
        if isinstance(x, Iterator) and not isinstance(x, io.IOBase):
            self._note(name, Unseen(x))
        else:
            self.see(x, name, mine=mine)

    def _python_module(
        self, module: types.ModuleType, name: str, attributes: frozenset[str]
    ) -> None:
        if is_installed(module.__name__) or is_own_package(module.__name__):
            return
        if (key := (id(module), attributes)) in self._seen:
            return
        self._seen[key] = module
        for k in sorted(attributes & vars(module).keys()):
            value = vars(module)[k]
            if isinstance(value, types.ModuleType):
                self._python_module(value, f"{name}.{k}", attributes)
            else:
                self._named(value, f"{name}.{k}", True)

    def _network(self, root: nn.Module, name: str, mine: bool) -> None:
        for path, module in root.named_modules():
            if module is not root and not self._is_new(module):
                continue
            label = f"{name}.{path}" if path else name
            self._note(label, _Same(module))
            self.see(type(module), type(module).__name__)
            inside = mine and not is_installed(type(module).__module__)
            for k, v in plain_attributes(module).items():
                self.see(v, f"{label}.{k}", mine=inside)
            own: dict[str, Any] = {"recurse": False, "remove_duplicate": False}
            for k, v in (*module.named_parameters(**own), *module.named_buffers(**own)):
                self.see(v, f"{label}.{k}")

    def _object(self, x: Any, name: str, mine: bool) -> None:
        self._note(name, _content(x, mine))
        kind = type(x)
        if not _is_opaque(kind):
            self.see(kind, kind.__name__)
            self._attributes(x, name, mine and not is_installed(kind.__module__))

    def _attributes(self, x: Any, name: str, mine: bool) -> None:
        for k, v in getattr(x, "__dict__", {}).items():
            self.see(v, f"{name}.{k}", mine=mine)
        for kind in type(x).__mro__:
            for k in _slots(kind):
                if hasattr(x, k):
                    self.see(getattr(x, k), f"{name}.{k}", mine=mine)

    def _class(self, kind: type, name: str) -> None:
        for base in kind.__mro__:
            if _is_opaque(base) or is_own_package(base.__module__):
                continue
            if base is not kind:
                self.see(base, base.__name__)
                continue
            mine = not is_installed(base.__module__)
            for k, v in vars(base).items():
                if k in _MADE_BY_PYTHON:
                    continue
                if isinstance(v, _PLAIN):
                    self._note(f"{name}.{k}", _value(v))
                elif mine:
                    for part in _parts(v):
                        self.see(part, f"{name}.{k}")


def _value(x: Any) -> Any:
    # NaN differs from itself, 0.0 equals -0.0, and 1 equals True.
    return type(x), repr(x) if isinstance(x, float | complex) else x


def _content(x: Any, mine: bool) -> Any:
    """Return what an object is compared by: arrays by what they hold, others by identity."""
    try:
        view = memoryview(x)
        if view.nbytes > LARGE:
            return Unseen(x) if mine else _Same(x)
        return type(x), view.format, view.shape, view.tobytes()
    except (TypeError, ValueError, NotImplementedError):
        return _Same(x)


def _parts(x: Any) -> tuple[Any, ...]:
    """Return the functions in a property or a method of a class; anything else as it is."""
    if isinstance(x, property):
        return tuple(f for f in (x.fget, x.fset) if f is not None)
    if isinstance(x, staticmethod | classmethod):
        return (x.__func__,)
    return (x,)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    named = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(k for k in named if not k.startswith("__"))


@functools.lru_cache(maxsize=4096)
def _is_opaque(kind: type) -> bool:
    module = kind.__module__
    return any(module == root or module.startswith(f"{root}.") for root in _OPAQUE)
