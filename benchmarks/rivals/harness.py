"""The comparison: every rival in its own process and environment, gradients first, then times.

For each case of a workload and each number of threads: all gradients are compared in float64;
those that are right run in interleaved repetitions, CPU time taken inside the workers; then the
peak memory of each in a fresh process.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.rivals import install
from metafocus.comparison.report import environment

ROOT = Path(__file__).resolve().parents[2]
CONTENDERS = Path(__file__).parent / "contenders"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = 0.08
"""Seconds of one measurement: shorter calls are repeated to fill it."""
SLOW = 5.0
"""Seconds of a first call from which it says what a call takes: there is no second before."""


MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""What makes glibc give blocks back when they are freed, so that a peak can be seen."""
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""What makes glibc keep freed blocks: else page faults are timed, which depend on the past."""


class Failure(Exception):
    """What a worker answered instead of a result."""


class Worker:
    """A contender file in a process of its own."""

    def __init__(
        self,
        name: str,
        facts: dict[str, Any],
        threads: int,
        *,
        malloc: bool = False,
        root: Path = ROOT,
    ):
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        settings |= MALLOC if malloc else KEEPING
        paths = [str(root), *([facts["path"]] if facts.get("path") else [])]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [facts["python"], "-m", "benchmarks.rivals.worker", name, str(threads)],
            cwd=root,
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            Failure: with the error of the worker, or what it said before it died.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            words = [x for x in self.log.read().splitlines() if x.strip()]
            raise Failure(words[-1] if words else f"the worker ended with status {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass
        self.process.wait()
        self.log.close()


class Race:
    """All contenders of one workload at one number of threads."""

    def __init__(self, workload: str, threads: int, only: Iterable[str] | None, folder: Path):
        self.workload = workload
        self.definition = defined(workload)
        self.threads = threads
        self.folder = folder
        self.facts = contenders(workload, only)
        self.workers = {
            name: Worker(name, facts, threads)
            for name, facts in self.facts.items()
            if "error" not in facts and "not" not in facts
        }

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            worker.close()

    def run(self, case: dict[str, Any], repeats: int, memory: bool) -> dict[str, Any]:
        """Return the rows of one case, by label."""
        kept = getattr(self.definition, "DTYPE", "float32")
        check_case = getattr(self.definition, "check_case", lambda case: case)
        rows, labels = self.checked(check_case(case))
        data = self.saved(case)
        request = {"workload": self.workload, "case": case, "data": data, "dtype": kept}
        for name, some in labels.items():
            made = self.workers[name].ask("load", **request)["names"]
            # The smaller case of the check may have forms that this one leaves out.
            for label in set(some) - set(made):
                some.remove(label)
                del rows[label]
        if repeats:
            self.timed(rows, labels, repeats)
        wanted = getattr(self.definition, "MEMORY", {})
        if memory and wanted is not None and wanted.items() <= case.items():
            countable = getattr(self.definition, "COUNTABLE", {}).items() <= case.items()
            counted = bool(repeats) and countable
            self.weighed(rows, labels, request, counted=counted)
        return rows

    def saved(self, case: dict[str, Any]) -> str:
        path = self.folder / "data.pt"
        torch.manual_seed(0)
        torch.save(self.definition.data(case), path)
        return str(path)

    def checked(self, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Compare all gradients in float64; return rows, and the labels to be timed by worker."""
        rows: dict[str, Any] = {}
        found: dict[str, tuple[str, torch.Tensor]] = {}
        data = self.saved(case)
        for name, facts in self.facts.items():
            about = {"rival": name, "version": facts.get("version")}
            if name not in self.workers:
                verdict = "absent" if "error" in facts else "not expressible"
                message = facts.get("error", facts.get("not"))
                rows[name] = {**about, "verdict": verdict, "message": message}
                continue
            worker = self.workers[name]
            request = {"workload": self.workload, "case": case, "data": data, "dtype": "float64"}
            try:
                names = worker.ask("load", **request)["names"]
            except Failure as failure:
                rows[name] = {**about, "verdict": "failed", "message": str(failure)}
                continue
            for label in names:
                path = str(self.folder / "gradient.pt")
                try:
                    worker.ask("gradient", name=label, to=path)
                    found[label] = (name, torch.load(path))
                    rows[label] = dict(about)
                except Failure as failure:
                    rows[label] = {**about, "verdict": "failed", "message": str(failure)}
        baselines = getattr(self.definition, "BASELINES", ())
        compared = {k: v for k, v in found.items() if k not in baselines}
        rows = judged(rows, compared, self.definition.REFERENCE, self.definition.TOLERANCE)
        labels: dict[str, list[str]] = {}
        for label, (name, _) in found.items():
            if label in baselines:
                rows[label]["verdict"] = "baseline"
            if rows[label]["verdict"] in ("right", "baseline"):
                labels.setdefault(name, []).append(label)
        return rows, labels

    def timed(self, rows: dict[str, Any], labels: dict[str, list[str]], repeats: int) -> None:
        """Add interleaved CPU and wall times, and ratios to the reference."""
        pairs = [(name, label) for name, some in labels.items() for label in some]
        calls = {}
        for name, label in pairs:
            first = warm = self.workers[name].ask("time", name=label, calls=1)["wall"]
            if first < SLOW or self.facts[name].get("compiles"):
                warm = self.workers[name].ask("time", name=label, calls=1)["wall"]
            rows[label]["first_call"] = first
            calls[label] = min(100, max(1, math.ceil(BLOCK / warm)))
            rows[label] |= {"cpu": [], "wall": []}
        for repetition in range(repeats):
            # Shuffled: what a large contender leaves in the caches slows the one after it.
            for name, label in random.Random(repetition).sample(pairs, len(pairs)):
                took = self.workers[name].ask("time", name=label, calls=calls[label])
                rows[label]["cpu"].append(took["cpu"])
                rows[label]["wall"].append(took["wall"])
        base = rows[self.definition.REFERENCE]["cpu"]
        for _, label in pairs:
            low, middle, high = quartiles(rows[label]["cpu"], base)
            rows[label] |= {
                "seconds": statistics.median(rows[label]["cpu"]),
                "ratio": middle,
                "ratio_quartiles": [low, high],
            }

    def weighed(
        self,
        rows: dict[str, Any],
        labels: dict[str, list[str]],
        request: dict[str, Any],
        counted: bool,
    ) -> None:
        """Add the peak memory of each, in a fresh process."""
        for name, some in labels.items():
            # What takes minutes to compile is not compiled again.
            for label in () if self.facts[name].get("compiles") else some:
                worker = Worker(name, self.facts[name], self.threads, malloc=True)
                try:
                    worker.ask("load", **request)
                    rows[label] |= worker.ask("peak", name=label, counted=counted)
                except Failure as failure:
                    rows[label] |= {"message": f"memory: {failure}"}
                finally:
                    worker.close()


def quartiles(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of the per-repetition ratios of two lists of times."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high


def defined(workload: str) -> ModuleType:
    """Return the definition of a workload."""
    return importlib.import_module(f"benchmarks.rivals.workloads.{workload}")


def judged(
    rows: dict[str, Any],
    found: dict[str, tuple[str, torch.Tensor]],
    reference: str,
    tolerance: float,
) -> dict[str, Any]:
    """Return the rows with error and verdict: right, or wrong with its relative error.

    Raises:
        AssertionError: if the reference is missing, or one of ours is wrong.
    """
    if reference not in found:
        raise AssertionError(f"no gradient of the reference {reference!r}: {rows}")
    exact = found[reference][1]
    judged = dict(rows)
    for label, (_, gradient) in found.items():
        if gradient.shape != exact.shape:
            error = float("inf")
        else:
            error = float((gradient - exact).norm() / exact.norm())
        right = error <= tolerance
        if not right and label.startswith("metafocus"):
            raise AssertionError(f"{label}: relative error {error:.1e} > {tolerance:.0e}")
        verdict = {"error": error, "verdict": "right" if right else "wrong"}
        judged[label] = {**judged[label], **verdict}
    return judged


def contenders(workload: str, only: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the contender files of a workload: interpreter, path, version; or why not."""
    installed = install.manifest()
    found = {}
    for file in sorted(CONTENDERS.glob("[a-z]*.py")):
        constants, functions = declared(file)
        reason = constants.get("NOT", {}).get(workload)
        if (only is not None and file.stem not in only) or (
            workload not in functions and reason is None
        ):
            continue
        package = constants["PACKAGE"]
        if package is None:
            facts = {
                "python": sys.executable,
                "path": None,
                "version": f"torch {torch.__version__}",
            }
        else:
            facts = installed.get(package, {"error": f"not installed ({install.__name__})"})
        facts = {**facts, "compiles": constants.get("COMPILES", False)}
        found[file.stem] = facts if reason is None else {**facts, "not": reason}
    return found


def declared(file: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the constants and the names of the functions of a contender file.

    Read, not imported: the rival itself is not there in this environment.
    """
    constants, functions = {}, set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            functions.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                constants[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return constants, functions


def save(path: Path, workload: str, definition: ModuleType, runs: list[dict[str, Any]]) -> None:
    """Write the runs of a workload with the environment."""
    kept = getattr(torch, getattr(definition, "DTYPE", "float32"))
    report = {
        "workload": workload,
        "title": definition.TITLE,
        "reference": definition.REFERENCE,
        "environment": {**environment(kept), "threads": sorted({r["threads"] for r in runs})},
        "runs": runs,
    }
    path.write_text(json.dumps(rounded(report), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Return the report with six digits of every float: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
