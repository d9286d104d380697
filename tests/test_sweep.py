"""sweep: a cell is computed once, whatever stops a run and however many runs there are."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from sweeping import CELLS, EXECUTORS, PACKAGES, Noted, calls, pool

import metafocus as mf
from metafocus.cells.single import name_of

VALUES = [cell["x"] * cell["scale"] for cell in CELLS]


def values(found) -> list[float]:
    return [outcome.result["value"] for outcome in found]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.json"))


def test_one_file_a_cell_in_the_order_of_the_cells(tmp_path):
    found = mf.sweep(Noted(str(tmp_path / "calls")), CELLS, folder=tmp_path / "out")
    assert values(found) == VALUES
    assert [outcome.cell for outcome in found] == CELLS
    assert files(tmp_path / "out") == sorted(f"{name_of(cell)}.json" for cell in CELLS)
    record = json.loads(found[3].path.read_text())
    assert (record["cell"], record["error"]) == (CELLS[3], None)
    assert record["result"] == found[3].result and record["seconds"] == found[3].seconds


def test_finished_cells_are_not_computed_again(tmp_path):
    noted = tmp_path / "calls"
    fn = Noted(str(noted))
    mf.sweep(fn, CELLS[:5], folder=tmp_path)
    found = mf.sweep(fn, CELLS, folder=tmp_path)
    assert values(found) == VALUES and len(calls(noted)) == len(CELLS)
    again = mf.sweep(fn, reversed(CELLS), folder=tmp_path)
    assert values(again) == VALUES[::-1] and len(calls(noted)) == len(CELLS)


def test_a_cell_that_is_given_twice_is_one(tmp_path):
    noted = tmp_path / "calls"
    same = [CELLS[1], dict(reversed(CELLS[1].items())), CELLS[1]]
    found = mf.sweep(Noted(str(noted)), same, folder=tmp_path)
    assert values(found) == [VALUES[1]] * 3 and len(calls(noted)) == 1


@pytest.mark.parametrize("executor", [None, "threads"])
def test_a_failure_is_kept_and_the_others_go_on(tmp_path, capsys, executor):
    noted = tmp_path / "calls"
    with ThreadPoolExecutor(2) as threads:
        options = {"folder": tmp_path / "out", "executor": threads if executor else None}
        found = mf.sweep(Noted(str(noted), bad=(2,)), CELLS, **options)
        failed = [outcome for outcome in found if outcome.error]
        assert [outcome.cell["x"] for outcome in failed] == [2, 2]
        assert all(o.result is None and "no answer for 2" in (o.error or "") for o in failed)
        assert "2 of 8 cells failed, the first with ArithmeticError" in capsys.readouterr().err
        # They stay as they are until they are asked for.
        mended = Noted(str(noted))
        with pytest.warns(mf.errors.ChangedWarning, match="8 of 8 finished cells"):
            again = mf.sweep(mended, CELLS, **options)
        assert [o.error for o in again] == [o.error for o in found]
        assert len(calls(noted)) == 8
        with pytest.warns(mf.errors.ChangedWarning, match="6 of 6 finished cells"):
            assert values(mf.sweep(mended, CELLS, retry=True, **options)) == VALUES
        assert len(calls(noted)) == 10


def test_a_retry_that_fails_again_is_tried_once(tmp_path, capsys):
    noted = tmp_path / "calls"
    fn = Noted(str(noted), bad=(0, 1, 2, 3))
    mf.sweep(fn, CELLS[:2], folder=tmp_path / "out")
    mf.sweep(fn, CELLS[:2], folder=tmp_path / "out", retry=True)
    assert len(calls(noted)) == 4
    capsys.readouterr()


def test_a_result_that_is_no_json_is_a_failure(tmp_path, capsys):
    (found,) = mf.sweep(lambda cell: {1, 2}, [0], folder=tmp_path)
    assert "not JSON serializable" in (found.error or "")
    capsys.readouterr()


def test_what_is_not_finite_is_the_same_now_and_later(tmp_path):
    once = mf.sweep(lambda cell: [math.nan, (1, 2)], [0], folder=tmp_path)
    again = mf.sweep(lambda cell: [math.nan, (1, 2)], [0], folder=tmp_path)
    assert once == again and once[0].result == [None, [1, 2]]


@dataclass(frozen=True)
class Cell:
    lr: float
    steps: int = 3


def test_a_dataclass_is_a_cell(tmp_path):
    cells = [Cell(0.1), Cell(0.2)]
    found = mf.sweep(lambda cell: cell.lr * cell.steps, cells, folder=tmp_path)
    assert [outcome.cell for outcome in found] == cells
    assert json.loads(found[0].path.read_text())["cell"] == {"lr": 0.1, "steps": 3}
    # Later the same content may come as a dict.
    assert found[0].path.stem == name_of({"steps": 3, "lr": 0.1})


@pytest.mark.parametrize("cell", [{"a": math.nan}, {"a": {1}}, object()])
def test_a_cell_without_a_name_is_refused(tmp_path, cell):
    with pytest.raises(mf.errors.ProblemError, match="cannot be written as JSON"):
        mf.sweep(print, [cell], folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path):
    with pytest.raises(mf.errors.ProblemError, match="fn must be a function of a cell, got int"):
        mf.sweep(3, [1], folder=tmp_path)  # pyright: ignore[reportArgumentType]
    (tmp_path / "file").write_text("")
    with pytest.raises(mf.errors.DataError, match="folder="):
        mf.sweep(str, [1], folder=tmp_path / "file" / "out")
    (tmp_path / f"{name_of(1)}.json").write_text("{}")
    with pytest.raises(mf.errors.DataError, match="is not a file of a sweep"):
        mf.sweep(str, [1], folder=tmp_path)


def test_another_function_in_the_same_folder_is_refused(tmp_path):
    mf.sweep(Noted(str(tmp_path / "calls")), CELLS[:1], folder=tmp_path / "out")
    with pytest.raises(mf.errors.DataError, match="holds results of Noted, not of str"):
        mf.sweep(str, CELLS[:1], folder=tmp_path / "out")
    # A partial function has the name of the one that it calls.
    mf.sweep(functools.partial(str), [0], folder=tmp_path / "text")
    with pytest.warns(mf.errors.ChangedWarning):
        assert mf.sweep(str, [0], folder=tmp_path / "text")[0].result == "0"


def test_a_function_that_has_changed_is_told(tmp_path):
    def times(factor):
        return lambda cell: factor * cell

    mf.sweep(times(2), [1, 2], folder=tmp_path)
    # Another object of the same content is the same function.
    assert [o.result for o in mf.sweep(times(2), [1, 2], folder=tmp_path)] == [2, 4]
    with pytest.warns(mf.errors.ChangedWarning, match="2 of 2 finished cells .* are of other code"):
        found = mf.sweep(times(3), [1, 2, 3], folder=tmp_path)
    assert [o.result for o in found] == [2, 4, 9]
    # Files of before, and functions that hide what they hold, say nothing of their code.
    lock = threading.Lock()
    mf.sweep(lambda cell: lock.locked(), [1], folder=tmp_path / "lock")
    mf.sweep(lambda cell: lock.acquire(), [1], folder=tmp_path / "lock")
    assert not lock.locked()


def test_an_interrupt_ends_the_sweep_and_leaves_no_file(tmp_path):
    def stop(cell):
        if cell == 1:
            raise KeyboardInterrupt
        return cell

    with pytest.raises(KeyboardInterrupt):
        mf.sweep(stop, [0, 1, 2], folder=tmp_path)
    assert files(tmp_path) == [f"{name_of(0)}.json"]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def test_no_cells(tmp_path):
    assert mf.sweep(str, [], folder=tmp_path) == []


def test_a_cell_may_be_a_batch_of_cells(tmp_path):
    """As docs/sweeps.md stacks seeds: by `over_tasks`, with the results of one cell for each."""

    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 4).sum()

    def measured(fast, slow, x):
        value = loss(fast, slow, x)
        return value, {"loss": value}

    solver = mf.SGD(0.01, steps=3)
    meta = mf.bilevel(mf.Problem(loss, measured), solver=solver, estimator=mf.Unrolled())
    start = {"w": torch.zeros(3, dtype=torch.float64)}

    def episode(seed):
        draw = torch.Generator().manual_seed(seed)
        return mf.Episode(*torch.randn(2, 3, dtype=torch.float64, generator=draw))

    @torch.no_grad()
    def alone(seed):
        return meta(start, episode(seed))[0].item()

    @torch.no_grad()
    def together(seeds):
        _, aux = mf.over_tasks(meta)(start, mf.stack_episodes([episode(s) for s in seeds]))
        return aux.metrics["loss"].tolist()

    single = [o.result for o in mf.sweep(alone, range(4), folder=tmp_path / "alone")]
    (batch,) = mf.sweep(together, [[0, 1, 2, 3]], folder=tmp_path / "together")
    # The order of sums is the same; vectorised powers may differ in the last digit.
    assert batch.result == pytest.approx(single, rel=1e-14) and len(set(single)) == 4


def test_two_runs_share_the_cells(tmp_path):
    noted = tmp_path / "calls"
    fn, found = Noted(str(noted), seconds=0.02), {}

    def run(name, cells):
        found[name] = mf.sweep(fn, cells, folder=tmp_path / "out")

    threads = [
        threading.Thread(target=run, args=(i, cells)) for i, cells in enumerate((CELLS, CELLS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each cell ran in one of both, and both have every result.
    assert sorted(calls(noted)) == sorted(f"{c['x']} {c['scale']}" for c in CELLS)
    assert values(found[0]) == values(found[1]) == VALUES
    assert not list((tmp_path / "out" / ".locks").iterdir())


def test_a_cell_in_the_hands_of_another_run_comes_last(tmp_path):
    from filelock import FileLock

    folder = tmp_path / "out"
    (folder / ".locks").mkdir(parents=True)
    noted = tmp_path / "calls"
    lock = FileLock(folder / ".locks" / f"{name_of(CELLS[0])}.lock", thread_local=False)
    lock.acquire()
    thread = threading.Thread(
        target=mf.sweep, args=(Noted(str(noted)), CELLS), kwargs={"folder": folder}
    )
    thread.start()
    wait_for(lambda: len(calls(noted)) == len(CELLS) - 1)
    # That run has died without a result: the cell is computed here.
    lock.release()
    thread.join()
    assert calls(noted)[-1] == "0 0.5" and len(files(folder)) == len(CELLS)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def everything(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all that it has started, in sessions of their own too."""
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


@pytest.mark.slow
@pytest.mark.parametrize("how", EXECUTORS)
def test_killed_twice_equals_uninterrupted(tmp_path, monkeypatch, how):
    """As when the machine goes down: workers and servers of an executor are killed too."""
    if how in PACKAGES:
        pytest.importorskip(PACKAGES[how])
    importable(monkeypatch)
    folder, noted = tmp_path / "out", tmp_path / "calls"
    script = Path(__file__).with_name("sweeping.py")
    command = [sys.executable, "-W", "ignore", str(script), str(folder), str(noted), how]
    for finished in (2, 5):
        with subprocess.Popen(command) as process:
            wait_for(lambda n=finished: len(list(folder.glob("*.json"))) >= n, 900)
            for one in everything(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        # What was in its last moments may still have written its file.
        wait_for(lambda: not locked(folder))
    stopped = len(calls(noted)) - len(files(folder))
    subprocess.run(command, check=True, timeout=900)
    whole = mf.sweep(Noted(str(tmp_path / "other")), CELLS, folder=tmp_path / "whole")
    fn = Noted(str(noted), seconds=0.15)  # of the same content as the script's
    assert values(mf.sweep(fn, CELLS, folder=folder)) == values(whole) == VALUES
    assert files(folder) == files(tmp_path / "whole")
    # Only what a kill cut off was begun again.
    assert len(calls(noted)) == len(CELLS) + stopped
    # submitit runs all jobs at once; others one in each of two workers.
    assert stopped <= (2 * len(CELLS) if how == "submitit" else 4)


def locked(folder: Path) -> bool:
    """Whether a process still has a cell in its hands."""
    from filelock import FileLock, Timeout

    for path in (folder / ".locks").iterdir():
        try:
            FileLock(path, timeout=0).acquire().lock.release()
        except Timeout:
            return True
    return False


@pytest.mark.slow
def test_a_process_pool(tmp_path):
    with pool() as executor:
        found = mf.sweep(
            Noted(str(tmp_path / "calls"), bad=(3,)),
            CELLS,
            folder=tmp_path / "out",
            executor=executor,
        )
    assert [o.result and o.result["value"] for o in found] == [*VALUES[:6], None, None]
    assert os.getpid() not in {o.result["process"] for o in found[:6]}


def importable(monkeypatch):
    """Let processes that start from nothing import the functions of the tests."""
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", PACKAGES)
def test_other_executors(tmp_path, monkeypatch, how):
    pytest.importorskip(PACKAGES[how])
    importable(monkeypatch)
    fn = Noted(str(tmp_path / "calls"))
    with EXECUTORS[how](tmp_path) as executor:
        found = mf.sweep(fn, CELLS[:3], folder=tmp_path / "out", executor=executor)
    assert values(found) == VALUES[:3]
    processes = {o.result["process"] for o in found}
    assert os.getpid() not in processes and len(processes) == (3 if how == "submitit" else 2)
