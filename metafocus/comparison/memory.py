"""Peak memory of a computation: exactly that of its live tensors, or that of a new process."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from metafocus.torch_internals import TorchDispatchMode, pytree, storage_key

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
        key = storage_key(storage)
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], Result], device: torch.device | None = None) -> tuple[Result, int]:
    """Return `run()` and the peak of bytes in tensors that it made, saved ones included.

    Deterministic: what operators allocate inside themselves is not counted on a CPU. On a CUDA
    device the caching allocator's own peak is used.

    Args:
        run: what to call, once.
        device: where its tensors are; default: CUDA where this process has used it.

    Example:
        >>> _, peak = peak_bytes(lambda: (torch.ones(256) + 1).sum())
        >>> peak
        2048
    """
    if device is None:
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = torch.device("cuda" if used else "cpu")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        result = run()
    return result, live.peak


def peak_rss(run: Callable[[], Any]) -> int:
    """Return how far the memory of a process grows while it calls `run()`, in bytes.

    The call is made in a forked process of one thread, whose allocator gives new blocks back when
    they are freed. What the parent had freed but kept is used again, so this is an upper bound.

    Raises:
        OSError: where there is no /proc (Linux only), or if the process died.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, str(_grown(run)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise OSError("the forked process died before it could report its peak memory.")
    return int(answer)


def _grown(run: Callable[[], Any]) -> int:
    # The other threads of the parent's pool do not exist here.
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 1 << 16)
    libc.mallopt(trim_threshold, 0)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - before


def process_memory(key: str) -> int:
    """Return `VmRSS` or its peak `VmHWM` of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
