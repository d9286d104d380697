"""A hash of what an object holds: functions by their code, tensors by their values."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import ProblemError
from metafocus.factories import Made

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, range)


def digest(*values: Any) -> str:
    """Return a hash of the content of some objects, the same in every process.

    A function counts by its code, its defaults, what it closes over, and the functions, numbers
    and tensors of its own module that it names. What it calls in other modules is not seen.

    Raises:
        ProblemError: for an object that hides what it holds.

    Example:
        >>> digest(lambda x: x + 1) == digest(lambda x: x + 1), digest(1.0) == digest(2.0)
        (True, False)
    """
    found = hashlib.sha256()
    for piece in _pieces(values, {}):
        # With its length, so that two texts cannot run into one another.
        found.update(str(len(piece)).encode() + b":" + piece)
    return found.hexdigest()[:16]


def _pieces(x: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    if isinstance(x, _PLAIN):
        yield f"{type(x).__name__} {x!r}".encode()
        return
    if id(x) in seen:
        yield b"again"
        return
    # The object too: a temporary one would leave its number to another.
    seen[id(x)] = x
    yield f"{type(x).__module__}.{type(x).__qualname__}".encode()
    if isinstance(x, Tensor):
        # A frozen parameter does not adapt, whatever its values.
        frozen = isinstance(x, nn.Parameter) and not x.requires_grad
        yield f"{x.dtype} {list(x.shape)} {frozen}".encode()
        flat = x.detach().cpu().contiguous().reshape(-1)
        yield from (part.view(torch.uint8).numpy().tobytes() for part in flat.split(2**20))
    elif isinstance(x, torch.Generator):
        yield x.get_state().numpy().tobytes()
    elif isinstance(x, dict):
        for key in sorted(x, key=repr):
            yield from _pieces((key, x[key]), seen)
    elif isinstance(x, list | tuple | set | frozenset):
        yield str(len(x)).encode()
        for value in sorted(x, key=repr) if isinstance(x, set | frozenset) else x:
            yield from _pieces(value, seen)
    elif isinstance(x, Made):
        yield from _pieces((x.make.__module__, x.make.__qualname__, x.args, x.kwargs), seen)
    elif isinstance(x, types.FunctionType):
        yield from _function(x, seen)
    elif isinstance(x, types.MethodType):
        yield from _pieces((x.__self__, x.__func__.__qualname__), seen)
    elif isinstance(x, functools.partial):
        yield from _pieces((x.func, x.args, x.keywords), seen)
    elif isinstance(x, type | types.BuiltinFunctionType):
        yield f"{x.__module__}.{x.__qualname__}".encode()
    elif isinstance(x, nn.Module):
        yield from _module(x, seen)
    elif dataclasses.is_dataclass(x):
        yield from _pieces({f.name: getattr(x, f.name) for f in dataclasses.fields(x)}, seen)
    else:
        yield from _other(x, seen)


def _function(fn: types.FunctionType, seen: dict[int, Any]) -> Iterator[bytes]:
    yield from _code(fn.__code__, seen)
    yield from _pieces((fn.__defaults__, fn.__kwdefaults__), seen)
    for cell in fn.__closure__ or ():
        try:
            yield from _pieces(cell.cell_contents, seen)
        except ValueError:
            # Not assigned yet.
            continue
    if fn.__module__ and fn.__module__.partition(".")[0] in ("metafocus", "torch"):
        return
    for name in fn.__code__.co_names:
        value = fn.__globals__.get(name)
        mine = isinstance(value, types.FunctionType) and value.__module__ == fn.__module__
        if mine or isinstance(value, (*_PLAIN, Tensor)):
            yield from _pieces((name, value), seen)


def _code(code: types.CodeType, seen: dict[int, Any]) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant, seen)
        else:
            yield repr(constant).encode()


def _module(module: nn.Module, seen: dict[int, Any]) -> Iterator[bytes]:
    yield repr(module).encode()
    for name, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, _PLAIN) and k[0] != "_"}
        yield from _pieces((name, plain), {})
    yield from _pieces(dict(module.state_dict(keep_vars=True)), seen)


def _other(x: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    held = getattr(x, "__dict__", None)
    if held is not None:
        yield from _pieces(held, seen)
        return
    try:
        yield pickle.dumps(x)
    except Exception as error:
        raise ProblemError(
            f"{type(x).__name__} cannot be hashed, so that a comparison cannot tell whether a kept "
            "result is of the same object: make it a frozen dataclass, or leave folder out."
        ) from error
