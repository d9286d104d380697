"""Processes that die, are stopped or meet each other: `python fault_script.py WHAT DIR`.

Everything is imported once, and each run is a fork of that. What was seen goes to `report.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from injected import Seen, moved, nan_gradient, poisoned
from processes import forked, wait
from trainer_script import pair, tiny, trainer, weights

from metafocus.errors import MetafocusError
from metafocus.trainer.checkpoints import damage, resumable

STEPS = 2


def run_once(folder: Path, **changes) -> None:
    """The command that is given again after a fault; its last weights are left in `final.pt`."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **changes}
    run = trainer(tiny(torch.float32), folder, save_total_limit=1, **settings)
    with quiet():
        run.train(resume_from_checkpoint=True)
    torch.save(weights(run.model), folder / "final.pt")


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# --- killed at every write ---------------------------------------------------------------------

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def killer(folder: Path, at: int, tally: Path | None = None):
    """Kill this process before its write number `at` below `folder`, as Python sees writes."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = args
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or "w" in str(mode)
        else:
            path, writes = args[0] if args else None, event in WRITES
        if writes and str(path).startswith(str(folder)):
            count += 1
            if tally is not None:
                with open(tally, "w") as file:
                    file.write(str(count))
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def limited(size: int) -> None:
    """Kill this process when it writes past `size` bytes of a file: in the middle of it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def after(folder: Path, reference: torch.Tensor) -> dict:
    """What a killed run left; then the same command again, to its end."""
    kept = sorted(folder.glob("checkpoint-*"))
    found = {
        "left": [path.name for path in kept],
        "damage": [damage(path) for path in kept],
        "newest": getattr(resumable(folder), "name", None),
    }
    code = wait(forked(lambda: run_once(folder)))
    same = code == 0 and torch.equal(torch.load(folder / "final.pt"), reference)
    rest = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    return {**found, "code": code, "same": same, "rest": rest}


def writes(folder: Path) -> list[dict]:
    whole, tally = folder / "whole", folder / "tally"
    assert wait(forked(lambda: (killer(whole, -1, tally), run_once(whole)))) == 0
    reference, count = torch.load(whole / "final.pt"), int(tally.read_text())
    print(count, "writes", file=sys.stderr)
    report = []
    for at in range(1, count + 1):
        place = folder / f"write-{at}"
        code = wait(forked(lambda p=place, k=at: (killer(p, k), run_once(p))))
        report.append({"at": at, "killed": code, **after(place, reference)})
    size = (whole / f"checkpoint-{STEPS}" / "model.safetensors").stat().st_size
    for part in (0, 1, 100, size // 2, size - 1):
        place = folder / f"size-{part}"
        code = wait(forked(lambda p=place, s=part: (limited(s), run_once(p))))
        report.append({"at": f"byte {part}", "killed": code, **after(place, reference)})
    return report


# --- signals -----------------------------------------------------------------------------------


def slow_step(run, folder: Path, seconds: float):
    """Make each step last, and say that it runs."""
    step = run.training_step

    def training_step(*args, **kwargs):
        (folder / "running").touch()
        time.sleep(seconds)
        return step(*args, **kwargs)

    run.training_step = training_step


def signalled(folder: Path, numbers: list[int], seconds: float = 0.3) -> dict:
    """Send signals in the middle of a step; what the process says and leaves."""

    def work() -> None:
        run = trainer(tiny(torch.float32), folder, max_steps=50)
        slow_step(run, folder, seconds)
        out = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 2)
        with quiet():
            run.train()

    folder.mkdir()
    pid = forked(lambda: exits(work))
    while not (folder / "running").exists():
        time.sleep(0.01)
    begin = time.monotonic()
    for number in numbers:
        os.kill(pid, number)
        time.sleep(0.05)
    code = wait(pid)
    return {
        "code": code,
        "seconds": time.monotonic() - begin,
        "stderr": (folder / "stderr").read_text(),
        "left": sorted(path.name for path in folder.glob("checkpoint-*")),
        "damage": [damage(path) for path in folder.glob("checkpoint-*")],
    }


def exits(work) -> None:
    """Run `work`, and end as the interpreter would after a SystemExit."""
    try:
        work()
    except SystemExit as stop:
        os._exit(stop.code)


def signals(folder: Path) -> dict:
    INT, TERM = signal.SIGINT, signal.SIGTERM
    return {
        "SIGINT": signalled(folder / "int", [INT]),
        "SIGTERM": signalled(folder / "term", [TERM]),
        "twice": signalled(folder / "twice", [TERM, TERM], seconds=30.0),
    }


# --- two runs ----------------------------------------------------------------------------------


def two(folder: Path) -> dict:
    """A second run in the directory of a first, before and after the first is killed."""
    place = folder / "run"
    place.mkdir()

    def first() -> None:
        run = trainer(tiny(torch.float32), place, max_steps=50)
        slow_step(run, place, 60.0)
        with quiet():
            run.train()

    def second() -> None:
        try:
            run_once(place)
        except ValueError as error:
            (folder / "said").write_text(str(error))

    pid = forked(first)
    while not (place / "running").exists():
        time.sleep(0.01)
    wait(forked(second))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left = sorted(path.name for path in place.iterdir())
    code = wait(forked(lambda: run_once(place)))
    return {"pid": pid, "said": (folder / "said").read_text(), "left": left, "code": code}


# --- ranks -------------------------------------------------------------------------------------


def ranks(folder: Path) -> dict:
    """A gradient that is NaN on the second of two ranks; SIGTERM to one of them."""

    def poison(rank: int) -> None:
        seen = Seen()
        kept = poisoned(nan_gradient, {1} if rank else set())
        settings = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}
        run = trainer(tiny(), folder / "poison", callbacks=[seen], kept=kept, **settings)
        with quiet():
            run.train()
        facts = {"moved": moved(seen), "rates": seen.rates, "skipped": run._guard.skipped}
        (folder / f"poison{rank}.json").write_text(json.dumps(facts))

    def stop(rank: int) -> None:
        run = trainer(tiny(), folder / "stop", per_device_train_batch_size=1)
        step = run.training_step

        def training_step(*args, **kwargs):
            if rank == 1 and run.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        run.training_step = training_step
        with quiet():
            run.train()

    codes = pair(poison)
    stopped = pair(lambda rank: exits(lambda: stop(rank)))
    left = [path.name for path in sorted((folder / "stop").glob("*"))]
    bad = [damage(path) for path in sorted((folder / "stop").glob("*"))]
    return {"codes": codes, "stopped": stopped, "left": left, "damage": bad}


def stalled(folder: Path) -> dict:
    """The second rank stands still in its third step; the first one must not wait for ever."""

    def work(rank: int) -> None:
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        run = trainer(tiny(), folder / "run", per_device_train_batch_size=1, ddp_timeout=8,
                      save_strategy="steps", save_steps=1)  # fmt: skip
        step = run.training_step

        def training_step(*args, **kwargs):
            if rank == 1 and run.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            return step(*args, **kwargs)

        run.training_step = training_step
        try:
            with quiet():
                run.train()
        except MetafocusError as error:
            (folder / "said").write_text(str(error))
        # Whoever has said it ends: the other rank is not asked.
        os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)
        os._exit(2)

    begin = time.monotonic()
    codes = pair(work)
    return {
        "codes": codes,
        "seconds": time.monotonic() - begin,
        "said": (folder / "said").read_text(),
        "newest": resumable(folder / "run").name,
    }


WHAT = {"writes": writes, "signals": signals, "two": two, "ranks": ranks, "stalled": stalled}

if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    report = WHAT[what](folder)
    (folder / "report.json").write_text(json.dumps(report))
