"""A hash of what an object holds: functions and classes by their code, tensors by their values."""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import ProblemError
from metafocus.factories import Made
from metafocus.torch_internals import child_table, uncompiled_function

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, range)
_OWN = nn.Module().__dict__.keys()
"""What every module has of its own."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def digest(*values: Any) -> str:
    """Return a hash of the content of some objects, the same in every process.

    A function counts by its code, its defaults, what it closes over, and the globals that it
    names; an object by what it holds and the code of its class; a module also by its buffers and
    hooks. All of this is followed through the files of the user. What a library defines counts by
    its name and the library's version; torch's default type and this package count by themselves.

    Raises:
        ProblemError: for an object that hides what it holds, such as an open file.

    Example:
        >>> digest(lambda x: x + 1) == digest(lambda x: x + 1), digest(1.0) == digest(2.0)
        (True, False)
    """
    return _Digests().of((_surroundings(), values)).hex()[:16]


class _Digests:
    """Hashes of objects; each is made once."""

    def __init__(self) -> None:
        # The object too: a temporary one would leave its number to another.
        self.known: dict[int, tuple[Any, bytes]] = {}
        self.open: dict[int, int] = {}

    def of(self, x: Any) -> bytes:
        """Return the hash of an object, from those of its parts: equal parts need not be one."""
        if isinstance(x, _PLAIN):
            return _hash([type(x).__name__.encode(), repr(x).encode()])
        if id(x) in self.known:
            return self.known[id(x)][1]
        if id(x) in self.open:
            # It holds itself, as a recursive function does.
            return _hash([b"again", str(len(self.open) - self.open[id(x)]).encode()])
        self.open[id(x)] = len(self.open)
        try:
            found = _hash(itertools.chain([_name(type(x))], self.parts(x)))
        finally:
            del self.open[id(x)]
        self.known[id(x)] = (x, found)
        return found

    def parts(self, x: Any) -> Iterator[bytes]:
        """Yield the content of an object, as bytes and hashes."""
        if isinstance(x, Tensor):
            yield from _tensor(x)
        elif isinstance(x, torch.Generator):
            yield x.get_state().numpy().tobytes()
        elif isinstance(x, type):
            yield from self.of_class(x)
        elif isinstance(x, types.ModuleType):
            yield _name(x)
        elif isinstance(x, types.FunctionType):
            yield from self.of_function(x)
        elif isinstance(x, types.CodeType):
            yield from self.of_code(x)
        elif isinstance(x, types.MethodType | classmethod | staticmethod):
            yield self.of((getattr(x, "__self__", None), x.__func__))
        elif isinstance(x, property):
            yield self.of((x.fget, x.fset, x.fdel))
        elif isinstance(x, functools.cached_property):
            yield self.of(x.func)
        elif isinstance(x, functools.partial):
            yield self.of((x.func, x.args, x.keywords))
        elif isinstance(x, Made):
            yield self.of((x.make, x.args, x.kwargs))
        elif isinstance(x, nn.Module):
            yield from self.of_module(x)
        else:
            yield from self.of_instance(x)

    def of_instance(self, x: Any) -> Iterator[bytes]:
        if not _is_library(type(x).__module__):
            yield self.of(type(x))
        if type(x) in (dict, types.MappingProxyType):
            yield from sorted(self.of(pair) for pair in x.items())
        elif isinstance(x, set | frozenset):
            yield from sorted(map(self.of, x))
        elif isinstance(x, list | tuple):
            yield from map(self.of, x)
        elif dataclasses.is_dataclass(x):
            yield self.of({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
        else:
            yield from self.of_other(x)

    def of_function(self, fn: types.FunctionType) -> Iterator[bytes]:
        yield self.of((fn.__defaults__, fn.__kwdefaults__))
        # Of what torch.compile returns, the original counts: around it are caches and locks.
        original = uncompiled_function(fn)
        if original is not fn:
            yield self.of(original)
            return
        for cell in fn.__closure__ or ():
            # An empty one is not assigned yet.
            if cell != types.CellType():
                yield self.of(cell.cell_contents)
        # The module of its globals: a decorator may have copied the name of another.
        where = fn.__globals__.get("__name__", "")
        if _is_library(where):
            yield from (fn.__qualname__.encode(), _version(where))
            return
        yield from self.of_code(fn.__code__)
        read, attributes = _names(fn.__code__)
        for name in sorted(read & fn.__globals__.keys()):
            yield name.encode()
            try:
                yield from self.of_global(fn.__globals__[name], attributes, set())
            except ProblemError as error:
                raise ProblemError(f"{fn.__qualname__} reads {name!r}: {error}") from error

    def of_global(self, value: Any, attributes: set[str], seen: set[int]) -> Iterator[bytes]:
        """Yield what a function reads by name: of a module of the user, what it may read there."""
        if not isinstance(value, types.ModuleType) or _is_library(value.__name__):
            yield self.of(value)
        elif id(value) not in seen:
            for name in sorted(attributes & vars(value).keys()):
                yield name.encode()
                yield from self.of_global(vars(value)[name], attributes, seen | {id(value)})

    def of_code(self, code: types.CodeType) -> Iterator[bytes]:
        yield code.co_code
        yield getattr(code, "co_exceptiontable", b"")
        yield self.of((code.co_names, code.co_consts))

    def of_class(self, cls: type) -> Iterator[bytes]:
        for base in cls.__mro__:
            yield _name(base)
            if _is_library(base.__module__):
                continue
            for name, value in sorted(vars(base).items()):
                is_code = isinstance(value, types.FunctionType | classmethod | staticmethod)
                # Names such as __doc__ and __weakref__ are the interpreter's.
                if is_code or isinstance(value, property) or not _is_hidden(name, value):
                    yield name.encode()
                    yield self.of(value)

    def of_module(self, module: nn.Module) -> Iterator[bytes]:
        mine = not _is_library(type(module).__module__)
        if mine:
            yield self.of(type(module))
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        weights = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        yield self.of((module.training, child_table(module), buffers, weights))
        # Which names are one tensor: the values would not tell.
        first: dict[int, str] = {}
        for name, value in module.named_parameters(remove_duplicate=False):
            if (tied := first.setdefault(id(value), name)) != name:
                yield f"{name} is {tied}".encode()
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
        yield self.of([hook for hook in hooks if not _is_library(_module_of(hook))])
        for name, value in sorted(vars(module).items()):
            if name in _OWN:
                continue
            try:
                yield from (name.encode(), self.of(value))
            except ProblemError:
                # Libraries keep caches and locks beside what matters.
                if mine:
                    raise

    def of_other(self, x: Any) -> Iterator[bytes]:
        """Yield what an object says of itself when it is copied."""
        try:
            held = x.__reduce_ex__(4)
        except Exception as error:
            raise ProblemError(
                f"{type(x).__name__} cannot be hashed, so that a comparison cannot tell whether a "
                "kept result is of the same object: make it a frozen dataclass, or leave folder "
                "out."
            ) from error
        if isinstance(held, str):
            # A name, as of a function in C. What functools.cache returns has a function inside.
            name = f"{_module_of(x)}.{held}".encode()
            yield from (name, self.of(getattr(x, "__wrapped__", None)))
            return
        make, args, state, items, pairs = (*held, None, None, None)[:5]
        cached = {k for k, v in _members(type(x)) if isinstance(v, functools.cached_property)}
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if k not in cached}
        yield self.of((make, args, state, list(items or ())))
        yield from sorted(self.of(pair) for pair in pairs or ())


def _hash(pieces: Iterable[bytes]) -> bytes:
    found = hashlib.sha256()
    for piece in pieces:
        # With its length, so that two texts cannot run into one another.
        found.update(str(len(piece)).encode() + b":" + piece)
    return found.digest()


def _tensor(x: Tensor) -> Iterator[bytes]:
    # A frozen parameter does not adapt, whatever its values.
    frozen = isinstance(x, nn.Parameter) and not x.requires_grad
    yield f"{x.dtype} {list(x.shape)} {x.device.type} {frozen}".encode()
    flat = x.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    yield from (part.view(torch.uint8).numpy().tobytes() for part in flat.split(2**20))


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return the globals that code reads, with the functions inside, and all names in it."""
    loads = dis.get_instructions(code)
    read = {i.argval for i in loads if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    every = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _names(inner)
            read, every = read | more[0], every | more[1]
    return read, every


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    for base in cls.__mro__:
        yield from vars(base).items()


def _is_hidden(name: str, value: Any) -> bool:
    """Return whether a member of a class is the interpreter's own."""
    own = types.MemberDescriptorType | types.GetSetDescriptorType
    return name.startswith("__") or name == "_abc_impl" or isinstance(value, own)


def _module_of(x: Any) -> str:
    return getattr(x, "__module__", None) or type(x).__module__


def _name(x: Any) -> bytes:
    """Return the name of a class or a module, of a library with its version."""
    where = x.__name__ if isinstance(x, types.ModuleType) else x.__module__
    own = "" if isinstance(x, types.ModuleType) else x.__qualname__
    return f"{where}.{own} ".encode() + (_version(where) if _is_library(where) else b"")


@functools.cache
def _is_library(name: str) -> bool:
    """Return whether a module is not the user's: of Python, of this package, or installed."""
    top = name.partition(".")[0]
    if top in ("metafocus", "torch") or top in sys.stdlib_module_names:
        return True
    spec = getattr(sys.modules.get(top), "__spec__", None)
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
    return any("site-packages" in p or "dist-packages" in p for p in map(str, places))


def _version(name: str) -> bytes:
    top = name.partition(".")[0]
    return f"{top} {getattr(sys.modules.get(top), '__version__', '')}".encode()


def _surroundings() -> tuple[Any, ...]:
    return _own_code(), torch.__version__, torch.get_default_dtype()


@functools.cache
def _own_code() -> str:
    """Return a hash of the files of this package: between releases its version stays the same."""
    folder = Path(inspect.getfile(digest)).parent
    files = sorted(folder.rglob("*.py"))
    return _hash(
        x for f in files for x in (str(f.relative_to(folder)).encode(), f.read_bytes())
    ).hex()
