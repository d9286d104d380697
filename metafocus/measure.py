"""Peak memory of a computation, exactly: the bytes of live tensors, not those of the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes, from birth to death."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._meet(x, 0)
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._meet(x, x.untyped_storage().nbytes())
        return out

    def _meet(self, x: Tensor, size: int) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], Result]) -> tuple[Result, int]:
    """Return `run()` and the peak of bytes in tensors that it made, saved ones included.

    Deterministic: what operators allocate inside themselves is not counted on a CPU. On a CUDA
    device the caching allocator's own peak is used.

    Example:
        >>> _, peak = peak_bytes(lambda: (torch.ones(256) + 1).sum())
        >>> peak
        2048
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with _LiveBytes() as live:
        result = run()
    return result, live.peak
