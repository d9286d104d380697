"""Raise at a chosen moment inside metafocus, and look at all state that a call may change."""

from __future__ import annotations

import ast
import functools
import linecache
import sys
import warnings
from pathlib import Path

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack

import metafocus as mf
from metafocus import calls
from metafocus.adapters.slots import Slot
from metafocus.calls import blocks, owners
from metafocus.lm.hf.heads import HeadHook

ROOT = str(Path(mf.__file__).parent)


@functools.cache
def blocks_of(path: str) -> tuple[frozenset[str], frozenset[int]]:
    """Return the functions of a file that enter and leave blocks, and its lines with `with`."""
    functions, lines = set(), set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
            if decorators & {"contextmanager", "with_block"}:
                functions.add(node.name)
        elif isinstance(node, ast.With):
            lines |= set(range(node.lineno, node.body[0].lineno))
    return frozenset(functions), frozenset(lines)


def is_own(frame) -> bool:
    return frame.f_code.co_filename.startswith(ROOT)


def of_a_block(frame) -> bool:
    """Return whether a frame itself enters or leaves a block."""
    path, name = frame.f_code.co_filename, frame.f_code.co_name
    functions, lines = blocks_of(path)
    # `run` is what `attempted` returns: the whole call is inside of it.
    machinery = "/calls/" in path and name != "run"
    return machinery or name in functions or frame.f_lineno in lines


def inside_a_block(frame) -> bool:
    """Return whether a block is being entered or left: code of the package's own, not a user's."""
    if of_a_block(frame):
        return True
    while (frame := frame.f_back) is not None:
        # A line with `with` further out is the one that the whole body runs under.
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if is_own(frame) and (("/calls/" in path and name != "run") or name in blocks_of(path)[0]):
            return True
    return False


class Interrupt:
    """Raises at the `at`-th line of metafocus that runs in this thread; counts all lines if None.

    Args:
        at: number of the line.
        error: what is raised.
        exits: raise where a block is entered or left, instead of everywhere else.
        function: raise in functions of this name only.

    Attributes:
        count: the lines so far.
        where: the line where it was raised, or None.
    """

    def __init__(
        self,
        at: int | None,
        error: type = KeyboardInterrupt,
        *,
        exits: bool = False,
        function: str | None = None,
    ):
        self.at, self.error, self.exits, self.function = at, error, exits, function
        self.count = 0
        self.where: str | None = None

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc) -> None:
        sys.settrace(self.before)

    def _call(self, frame, event, arg):
        return self._line if is_own(frame) else None

    def _line(self, frame, event, arg):
        if event != "line" or not self._counts(frame):
            return self._line
        self.count += 1
        if self.at is None or self.where is not None or self.count < self.at:
            return self._line
        if self.exits or self.function or not inside_a_block(frame):
            name = frame.f_code.co_filename.removeprefix(ROOT)
            self.where = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            raise self.error(f"on purpose at {self.where}")
        return self._line

    def _counts(self, frame) -> bool:
        name = frame.f_code.co_name
        if self.function is not None:
            return name == self.function
        if not self.exits:
            return True
        # Popped transforms cannot be pushed back after those around them have ended. And a lock is
        # left by one instruction, which Python never interrupts; a trace can raise before it.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return of_a_block(frame) and name != "outside_transforms" and "with LOCK" not in line


def everything(model, *generators) -> dict:
    """Return the state of a model, of random generators and of this thread."""
    return {**of_model(model), **of_thread(), **of_generators(*generators)}


def of_model(model) -> dict:
    found = {}
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            content = None if value is None else value.detach().cpu().numpy().tobytes()
            found[path, name] = id(value), hash(content)
        own = vars(module)
        for name in (
            "forward",
            "training",
            "gradient_checkpointing",
            "_gradient_checkpointing_func",
        ):
            found[path, name] = id(own.get(name))
        tables = {k: v for k, v in own.items() if k.endswith("_hooks") and isinstance(v, dict)}
        for kind, table in tables.items():
            # Slots and hooks of heads are installed once and stay.
            hooks = [(k, h) for k, h in table.items() if not isinstance(h, Slot | HeadHook)]
            found[path, kind] = tuple((k, id(h)) for k, h in hooks)
            for hook in table.values():
                if isinstance(hook, Slot):
                    assert hook.binding is None and not hook.swaps, path
                if isinstance(hook, HeadHook):
                    assert hook.reader is None
    if hasattr(model, "config"):
        found["attention"] = model.config._attn_implementation
    return found


def of_thread() -> dict:
    return {
        "gradients": torch.is_grad_enabled(),
        # Not by a function of the package: it would be interrupted.
        "overrides": torch._C._get_torch_function_state(),  # pyright: ignore
        "inference": torch.is_inference_mode_enabled(),
        "function modes": tuple(map(id, _get_current_function_mode_stack())),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "transforms": len(_functorch.get_interpreter_stack() or ()),
        "forward mode": forward_ad._current_level,
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast depth": (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
        "dtype": torch.get_default_dtype(),
        "warnings": len(warnings.filters),
        "call": calls.current(),
        "locked": blocks.LOCK._is_owned(),
        "open": len(blocks._UNDO),
        "owned": len(owners._OWNERS),
        "running": len(owners._RUNNING),
    }


def of_generators(*generators) -> dict:
    states = [torch.get_rng_state(), *(g.get_state() for g in generators)]
    return {("generator", i): s.numpy().tobytes() for i, s in enumerate(states)}


def difference(before: dict, after: dict) -> dict:
    """Return what differs, without the long contents."""
    odd = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return {k: "..." if k[0] == "generator" else (before.get(k), after.get(k)) for k in odd}
