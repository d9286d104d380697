"""Sweeps: a function over many cells, each result a file, shared by every run on one folder."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metafocus.cells.single import name_of, one_cell, read, settled
from metafocus.digests import digest
from metafocus.errors import ChangedWarning, ProblemError
from metafocus.files import unwritable

WAIT = 0.05
"""Seconds between two looks at an executor."""


@dataclass(frozen=True)
class Outcome:
    """What came of one cell.

    Attributes:
        cell: the cell as it was given.
        result: what the function returned, as JSON gives it back; None if the cell failed.
        error: the traceback of a cell that failed, else None.
        seconds: how long the cell took.
        path: its file.
    """

    cell: Any
    result: Any
    error: str | None
    seconds: float
    path: Path


def sweep(
    fn: Callable[[Any], Any],
    cells: Iterable[Any],
    *,
    folder: str | Path,
    executor: Any = None,
    retry: bool = False,
) -> list[Outcome]:
    """Return `fn(cell)` for every cell; each result is a file, and is never computed twice.

    The file of a cell is `folder/HASH.json`, where the hash is that of the cell's content. It is
    written whole when the cell ends. A sweep that was killed therefore goes on where it was, a
    longer list of cells computes the new ones only, and several runs on one folder share the
    cells: a lock keeps each cell to one of them. One folder is for one function; after a change
    to the function name another folder: results of other code are returned with a warning.

    Args:
        fn: takes a cell and returns what JSON can hold: numbers, texts, lists and dicts. It should
            set its own seeds. For another process it must be picklable: a function at the top of a
            module, or an instance of a class there.
        cells: what to call `fn` with: dicts, lists, numbers, texts, or dataclasses of these.
        folder: where the files are; it is made.
        executor: a `concurrent.futures.Executor`, or any object with `submit(fn, *args)` whose
            answer has `done()` and `result()`: process pools, Dask's, submitit's. None: here, one
            after another. Other machines must see the same folder.
        retry: run the cells again that failed before. They are otherwise left as they are.

    Returns:
        One `Outcome` for each cell, in the order of the cells. A cell whose function raised has
        its traceback in `error`; the others go on. Numbers that are not finite come back as None.

    Raises:
        ProblemError: if a cell cannot be written as JSON.
        DataError: if the folder cannot be written to, or holds the results of another function.
        ChangedWarning: if finished cells are of other code: of the function or what it reads, of
            torch or of metafocus.

    Example:
        >>> import tempfile
        >>> def square(cell):
        ...     return cell["x"] ** 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = sweep(square, [{"x": 2}, {"x": 3}], folder=folder)
        >>> [outcome.result for outcome in found]
        [4, 9]
    """
    if not callable(fn):
        raise ProblemError(f"fn must be a function of a cell, got {type(fn).__name__}.")
    return run_cells(fn, cells, folder=folder, executor=executor, retry=retry, code=_code(fn))


def run_cells(
    fn: Callable[[Any], Any],
    cells: Iterable[Any],
    *,
    folder: str | Path,
    executor: Any,
    retry: bool,
    code: str | None,
) -> list[Outcome]:
    """Do what `sweep` does.

    `code` is what finished cells must name, so that no warning is given; with None the cells
    themselves say by which code they were made.
    """
    folder, cells = Path(folder), list(cells)
    paths = [folder / f"{name_of(cell)}.json" for cell in cells]
    try:
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable("folder", folder, error) from error
    # A cell that is given twice is one cell.
    known = {path: read(path, fn) for path in paths}
    todo = {
        path: cell
        for path, cell in zip(paths, cells, strict=True)
        if not settled(known[path], retry)
    }
    _warn_of_changes([r for path, r in known.items() if r and path not in todo], code, folder)
    _run(fn, todo, len(known), executor, (code, retry))
    found = []
    for cell, path in zip(cells, paths, strict=True):
        record = read(path, fn)
        assert record is not None, path
        found.append(Outcome(cell, record["result"], record["error"], record["seconds"], path))
    failed = [outcome for outcome in {o.path: o for o in found}.values() if outcome.error]
    if failed:
        last = (failed[0].error or "").strip().splitlines()[-1]
        print(
            f"{len(failed)} of {len(set(paths))} cells failed, the first with {last}. Their files "
            "hold the tracebacks; sweep(..., retry=True) runs them again.",
            file=sys.stderr,
        )
    return found


def _run(
    fn: Callable[[Any], Any],
    todo: dict[Path, Any],
    total: int,
    executor: Any,
    how: tuple[str | None, bool],
) -> None:
    """Run the cells that are left; those in the hands of another run come last."""
    from tqdm import tqdm

    busy: dict[Path, Any] = {}
    with tqdm(total=total, initial=total - len(todo), unit="cell", disable=None) as bar:

        def ended(path: Path, settled: bool) -> None:
            if settled:
                bar.update()
            else:
                busy[path] = todo[path]

        _call(fn, todo, executor, (*how, False), ended)
        # Their locks are free when the other run has finished them, or has died.
        _call(fn, dict(busy), executor, (*how, True), ended)


def _call(
    fn: Callable[[Any], Any],
    cells: dict[Path, Any],
    executor: Any,
    how: tuple[str | None, bool, bool],
    ended: Callable[[Path, bool], None],
) -> None:
    if executor is None:
        for path, cell in cells.items():
            ended(path, one_cell(fn, cell, path, *how))
        return
    if not hasattr(executor, "submit"):
        raise ProblemError(
            f"executor must have submit(fn, *args), got {executor!r}. For four processes: "
            "concurrent.futures.ProcessPoolExecutor(4)."
        )
    futures = {
        path: executor.submit(one_cell, fn, cell, path, *how) for path, cell in cells.items()
    }
    try:
        while futures:
            for path in [path for path, future in futures.items() if future.done()]:
                ended(path, futures.pop(path).result())
            # Not concurrent.futures.wait: submitit's jobs are no futures of the standard library.
            time.sleep(WAIT)
    finally:
        # After an error or an interrupt: what has not begun need not begin.
        for future in futures.values():
            future.cancel()


def _code(fn: Any) -> str | None:
    try:
        return digest(fn)
    except ProblemError:
        # It hides what it holds, such as a lock: a change cannot be seen.
        return None


def _warn_of_changes(records: list[dict[str, Any]], code: str | None, folder: Path) -> None:
    if code is None:
        return
    others = [r for r in records if r.get("code") not in (None, code)]
    if others:
        warnings.warn(
            f"{len(others)} of {len(records)} finished cells in {str(folder)!r} are of other code: "
            f"{others[0]['function']}, something that it reads, torch or metafocus has changed. "
            "Name another folder, or remove their files to run them again.",
            ChangedWarning,
            stacklevel=4,
        )
