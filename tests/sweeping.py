"""Functions of cells at the top of a module, so that every process can import them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import metafocus as mf

CELLS = [{"x": x, "scale": scale} for x in range(4) for scale in (0.5, 2.0)]


@dataclass(frozen=True)
class Noted:
    """Notes each call in a file, so that a test can count them; fails for the given `x`."""

    calls: str
    seconds: float = 0.0
    bad: tuple[int, ...] = ()

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        with Path(self.calls).open("a") as file:
            file.write(f"{cell['x']} {cell['scale']}\n")
        time.sleep(self.seconds)
        if cell["x"] in self.bad:
            raise ArithmeticError(f"no answer for {cell['x']}")
        return {"value": cell["x"] * cell["scale"], "process": os.getpid()}


def calls(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def pool(workers: int = 2) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


@contextmanager
def submitit(folder: Path) -> Iterator[Any]:
    """Its local executor: each job is a process that starts from nothing, all at once."""
    from submitit import LocalExecutor

    executor = LocalExecutor(folder=folder / "jobs")
    executor.update_parameters(timeout_min=5)
    yield executor


@contextmanager
def dask(folder: Path) -> Iterator[Any]:
    from distributed import Client, LocalCluster

    options = {"threads_per_worker": 1, "dashboard_address": None, "local_directory": folder}
    with LocalCluster(2, **options) as cluster, Client(cluster) as client:
        yield client.get_executor()


class RayExecutor:
    """Ray's tasks as futures: the five lines of docs/sweeps.md."""

    def submit(self, fn: Any, *args: Any) -> Any:
        import ray

        return ray.remote(fn).remote(*args).future()


@contextmanager
def ray(folder: Path) -> Iterator[Any]:
    import ray

    # Its sockets lie there, whose paths have at most 107 characters: the folder's may be longer.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=short)
        try:
            yield RayExecutor()
        finally:
            ray.shutdown()


EXECUTORS = {
    "here": lambda folder: nullcontext(),
    "pool": lambda folder: pool(),
    "submitit": submitit,
    "dask": dask,
    "ray": ray,
}
PACKAGES = {"submitit": "submitit", "dask": "dask.distributed", "ray": "ray"}
"""What an executor needs."""


if __name__ == "__main__":
    # A run that a test kills: folder, file of calls, and how the cells run.
    folder, noted, how = sys.argv[1:]
    from sweeping import Noted as Importable

    with EXECUTORS[how](Path(noted).parent / f"{how}-{os.getpid()}") as executor:
        mf.sweep(Importable(noted, seconds=0.15), CELLS, folder=folder, executor=executor)
