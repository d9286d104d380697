"""A mutation run: change the library by one operator, constant or call, and see if a test fails.

By hand, from the root of the repository (pytest does not collect this file); Linux only, because
each run is a fork of a process that has imported torch already:

    python tests/mutation/run.py --sample 200 --minutes 40 --seed 0
    python tests/mutation/run.py --sample 200 --only linear solvers    # some groups of files
    python tests/mutation/run.py --summary                             # writes result.json

The tree is copied once to a temporary directory, where files are changed. Each group of files has
the tests of `TESTS`; those that fail without a mutation are left out and named in the result. The
sample is drawn by the seed, in equal parts from all groups. Results go to `results.jsonl`, one line
a mutant; a mutant that is there is not run again, so the same command goes on where the last one
stopped. A mutant is killed if a test fails, or if the run needs five times the processor time
of the unchanged tree. `notes.json` says of survivors why they change nothing, or which test kills
them now.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from mutants import Mutant, mutants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, SUMMARY, NOTES = HERE / "results.jsonl", HERE / "result.json", HERE / "notes.json"
TESTS = {
    "linear": ["linear"],
    "solvers": ["solvers", "implicit_family", "path"],
    "masks": ["masks"],
    "autodiff": ["autodiff", "recompute", "over_tasks"],
    "autodiff/safe_operators": ["safe_operators", "batch_norm", "operators"],
    "estimators": ["fixed_point", "penalty", "path", "implicit_family", "estimators"],
    "lm": ["token_loss", "likelihood", "per_example", "lm"],
    "lm/hf": ["heads", "sharing", "last_layer", "lm"],
}
"""Which tests run for the Python files of which folder of the package, quick ones first."""

FIRST = ("linear", "solvers", "masks", "autodiff", "estimators")
"""The groups with quick tests."""


class Watch:
    """A pytest plugin that keeps the names of the tests that failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one phase of one test."""
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be imported."""
        if report.failed:
            self.failed.append(report.nodeid)


def files(group: str) -> list[Path]:
    """Return the files of a group, as paths inside the repository."""
    found = sorted((ROOT / "metafocus" / group).glob("*.py"))
    return [f.relative_to(ROOT) for f in found if f.name != "__init__.py"]


def tests(
    tree: Path, group: str, options: list[str], seconds: float, changed: Path | None = None
) -> dict:
    """Run the tests of a group in a fork, with a limit on its processor time.

    Those that are named like the changed file come first: most mutants are killed there.
    """
    note = tree / "failed.json"
    note.unlink(missing_ok=True)
    stem = "" if changed is None else changed.stem.strip("_")
    names = sorted(TESTS[group], key=lambda name: stem not in name)
    paths = [f"tests/test_{name}.py" for name in names]
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        signal.alarm(3600)  # for a run that waits instead of working
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(tree)
        # The copy comes before this repository, also in the processes that tests start.
        sys.path[:] = [str(tree), *(p for p in sys.path if p not in (str(ROOT), str(HERE)))]
        os.environ["PYTHONPATH"] = str(tree)
        torch.set_num_threads(1)
        watch = Watch()
        code = int(pytest.main(["-q", "-p", "no:cacheprovider", *options, *paths], [watch]))
        note.write_text(json.dumps(watch.failed))
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)  # processes that its tests have left
    except ProcessLookupError:
        pass
    code = os.waitstatus_to_exitcode(status)
    failed = json.loads(note.read_text()) if note.exists() else []
    used = usage.ru_utime + usage.ru_stime
    return {
        "code": code,
        "failed": failed,
        "cpu_s": round(used, 1),
        "wall_s": round(time.monotonic() - begun, 1),
    }


def copied(to: Path) -> None:
    """Copy the files that git knows, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    )
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def past() -> list[dict]:
    """Return what was found so far."""
    return [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []


def baseline(tree: Path, group: str) -> tuple[list[str], float]:
    """Run the unchanged tree and a broken one; return options for pytest and a time limit."""
    whole = tests(tree, group, [], 3600)
    if whole["code"] not in (0, 1):
        sys.exit(f"{group}: pytest stops with {whole['code']} on the unchanged tree")
    victim = tree / files(group)[0]
    source = victim.read_text()
    victim.write_text("raise ImportError('broken on purpose')\n")
    broken = tests(tree, group, ["-x"], 3600)
    victim.write_text(source)
    if broken["code"] == 0:
        sys.exit(f"{group}: the tests do not see the copy of the tree in {tree}")
    print(f"{group}: {whole['cpu_s']} s of processor time, fails alone: {len(whole['failed'])}")
    return ["-x", *(f"--deselect={name}" for name in whole["failed"])], 5 * whole["cpu_s"] + 30


def run(groups: list[str], sample: int, seed: int, minutes: float) -> None:
    """Run a sample of mutants, in turn from each group, until the time is over."""
    deadline, known = time.monotonic() + 60 * minutes, {r["key"] for r in past()}
    chosen: list[list[tuple[str, Path, Mutant]]] = []
    for group in groups:
        all_of_it = [(group, f, m) for f in files(group) for m in mutants((ROOT / f).read_text())]
        random.Random(f"{seed} {group}").shuffle(all_of_it)
        print(f"{group}: {len(all_of_it)} mutants in {len(files(group))} files", flush=True)
        chosen.append(all_of_it[: -(-sample // len(groups))])
    turns = [m for row in _in_turn(chosen) for m in row][:sample]
    settings: dict[str, tuple[list[str], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copied(tree)
        for group, path, mutant in turns:
            key = f"{path}:{mutant.name}"
            if key in known:
                continue
            if time.monotonic() > deadline:
                return
            if group not in settings:
                settings[group] = baseline(tree, group)
            options, seconds = settings[group]
            source = (tree / path).read_text()
            (tree / path).write_text(mutant.source)
            found = tests(tree, group, options, seconds, path)
            (tree / path).write_text(source)
            if found["code"] not in (0, 1, 2, 4):
                # Pytest itself failed, as in an environment that somebody else changes. With 4 it
                # cannot import conftest.py, since the library refuses a default of its own.
                sys.exit(f"{key}: pytest stops with {found['code']}, which is no verdict")
            line = {
                "key": key,
                "line": mutant.line,
                "group": group,
                "kind": mutant.kind,
                "before": mutant.before[:200],
                "after": mutant.after[:200],
                "killed": found["code"] != 0,
                "by": found["failed"][:1] or [f"code {found['code']}"],
                "cpu_s": found["cpu_s"],
                "wall_s": found["wall_s"],
                "left_out": len(options) - 1,
                "seed": seed,
            }
            if found["code"] == 0:
                line.pop("by")
            with RESULTS.open("a") as out:
                out.write(json.dumps(line) + "\n")
            word = "killed" if line["killed"] else "SURVIVES"
            print(word, key, mutant.line, mutant.kind, flush=True)


def _in_turn(lists: list[list]) -> list[list]:
    longest = max(map(len, lists), default=0)
    return [[x[i] for x in lists if i < len(x)] for i in range(longest)]


def summarise() -> None:
    """Write result.json from all lines, with the notes on survivors."""
    lines = past()
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    counts: dict[str, collections.Counter] = {}
    for line in lines:
        count = counts.setdefault(line["group"], collections.Counter())
        count["run"] += 1
        if line["killed"]:
            count["killed"] += 1
        else:
            count[notes.get(line["key"], {}).get("verdict", "open")] += 1
    survivors = [
        {k: line[k] for k in ("key", "line", "kind", "before", "after")}
        | notes.get(line["key"], {})
        for line in lines
        if not line["killed"]
    ]
    result = {
        "torch": torch.__version__,
        "run": len(lines),
        "groups": {name: dict(count) for name, count in sorted(counts.items())},
        "survivors": survivors,
    }
    SUMMARY.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["groups"], indent=1))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(FIRST))
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    if not given.summary:
        run(given.only, given.sample, given.seed, given.minutes)
    summarise()


if __name__ == "__main__":
    main()
