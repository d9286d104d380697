"""Kept states in a directory: one safetensors file each, gone when the run is.

Every run has a directory of its own, with a lock that its process holds. The lock of a process
that was killed is free, and the next run to open the same store removes what it left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus.autodiff.stores.places import Shelf
from metafocus.errors import DataError, ProblemError

PREFIX = "metafocus-states-"
_LOCK = "lock"


@dataclass(frozen=True)
class Disk:
    """Keep states in files below a directory."""

    directory: str

    def open(self) -> Shelf:
        """Return an empty shelf, after removing what killed processes have left.

        Raises:
            DataError: if nothing can be written there.
        """
        parent = Path(self.directory)
        with _named(parent, "is not writable"):
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.glob(PREFIX + "*"):
                _remove_if_free(left)
            own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            return _Files(own)


class _Kind(NamedTuple):
    """What a safetensors file does not keep."""

    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    complex: bool


class _Files:
    def __init__(self, own: Path):
        self.own = own
        self.kinds: dict[int, list[_Kind]] = {}
        lock = _locked(own / _LOCK)
        assert lock is not None
        self._finalizer = weakref.finalize(self, _remove, own, lock)

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        odd = next((x for x in tensors if type(x) is not Tensor or x.layout != torch.strided), None)
        if odd is not None:
            raise ProblemError(
                f"mf.stores.disk keeps plain tensors, and a state holds a {type(odd).__name__} of "
                f"layout {odd.layout}. Use mf.stores.cpu() or keep the states on the device."
            )
        self.kinds[key] = [
            _Kind(x.device, tuple(x.shape), x.stride(), x.is_complex()) for x in tensors
        ]
        with _named(self.own.parent, "cannot hold another state", SafetensorError):
            save_file({str(i): _plain(x) for i, x in enumerate(tensors)}, self._path(key))

    def get(self, key: int) -> list[Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with _named(self.own.parent, "has lost a state", SafetensorError):
            found = load_file(self._path(key))
        return [_as_before(found[str(i)], kind) for i, kind in enumerate(self.kinds[key])]

    def drop(self, key: int) -> None:
        del self.kinds[key]
        self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        self.kinds.clear()
        self._finalizer()

    def _path(self, key: int) -> Path:
        return self.own / f"{key:08d}.safetensors"


@contextlib.contextmanager
def _named(directory: Path, what: str, *more: type[Exception]) -> Any:
    try:
        yield
    except (OSError, *more) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"the store directory {str(directory)!r} {what} ({reason}). Nothing but the states of "
            "this run is lost. Give mf.stores.disk a directory with more room, or keep fewer "
            "states: mf.stores.schedule(slots, on=mf.stores.disk(directory))."
        ) from error


def _plain(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    # Two entries of a state may share their memory, which a safetensors file does not allow.
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _as_before(x: Tensor, kind: _Kind) -> Tensor:
    x = torch.view_as_complex(x) if kind.complex else x
    if x.stride() != kind.stride and 0 not in kind.stride:
        # Kernels may add up in another order for other strides.
        x = torch.empty_strided(kind.shape, kind.stride, dtype=x.dtype).copy_(x)
    return x.to(kind.device)


def _locked(path: Path) -> int | None:
    """Return an open file whose lock this process holds; None if another one holds it."""
    # Not at the top: the module does not exist on Windows.
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _remove(own: Path, lock: int) -> None:
    shutil.rmtree(own, ignore_errors=True)
    os.close(lock)


def _remove_if_free(left: Path) -> None:
    # A directory of another user, or one that is being removed by another process.
    with contextlib.suppress(OSError):
        lock = _locked(left / _LOCK)
        if lock is not None:
            _remove(left, lock)
