"""The race as Markdown: verdicts on the targets, a table for each case, plots."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.rivals import plots
from benchmarks.rivals.targets import Verdict, verdicts

INTRODUCTION = """
Every rival in its own idiom, in the environment that it needs (`python -m
benchmarks.rivals.install`; `python -m benchmarks.rivals` runs the race). All gradients are compared
with the reference in float64 first: a rival that is wrong is reported as wrong, with its relative
error, and not timed. Then interleaved repetitions, CPU time measured inside a process for each
rival: the median, and the median of the per-repetition ratio to the reference with quartiles. With
two threads the CPU time of both is counted. *process*: the growth of the peak RSS over one call in
a fresh process whose allocator returns freed blocks; *tensors*: the peak of live tensors.
"""


def sections(folder: Path, figures: Path, link: str) -> list[str]:
    """Return the lines of all workloads with results; write their plots.

    Args:
        folder: where `rivals_*.json` are.
        figures: where the plots go.
        link: that folder, as the page sees it.
    """
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rivals_*.json"))]
    reports = [report for report in reports if "runs" in report]
    if not reports:
        return []
    judged = [(report, judge(report)) for report in reports]
    lines = ["", "## The race", "", _flow(INTRODUCTION), "", "### Targets", ""]
    lines += target_table(judged)
    figures.mkdir(parents=True, exist_ok=True)
    for report in reports:
        lines += section(report, figures, link)
    return lines


def judge(report: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on all targets of a workload."""
    targets = getattr(_definition(report), "TARGETS", [])
    return [v for target in targets for v in verdicts(target, report["runs"])]


def target_table(judged: list[tuple[dict[str, Any], list[Verdict]]]) -> list[str]:
    """Return one row for each target, case and number of threads."""
    lines = [
        "| workload | target | case | threads | against | allowed | measured | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report, found in judged:
        for v in found:
            value = "-" if v.value is None else f"{v.value:.3g}"
            verdict = v.words() if v.met else f"**{v.words()}**"
            lines.append(
                f"| {report['workload']} | {v.target.text} (*{v.target.ours}*) | "
                f"{case_words(v.case)} | {v.threads} | {v.other} | {v.target.at_most:.3g} | "
                f"{value} | {verdict} |"
            )
    return lines


def section(report: dict[str, Any], figures: Path, link: str) -> list[str]:
    """Return the lines of one workload."""
    definition = _definition(report)
    at = report["environment"]
    machine = f"torch {at['torch']}, Python {at['python']}, {at['machine']}, {at['cores']} cores"
    lines = ["", f"### {report['title']}", "", _flow(definition.TEXT), ""]
    lines += [f"{machine}; reference: *{report['reference']}*.", ""]
    for title, path in plots.write(report, figures):
        lines += [f"![{title}]({link}/{path.name})", ""]
    if hasattr(definition, "report"):
        lines += definition.report(report)
    for run in report["runs"]:
        threads = "one thread" if run["threads"] == 1 else f"{run['threads']} threads"
        lines += [f"**{case_words(run['case'])}**, {threads}, {run['repeats']} repetitions", ""]
        lines += [*table(run), ""]
    return lines[:-1]


def table(run: dict[str, Any]) -> list[str]:
    """Return the rows of one case, the fastest first, then those without a time."""
    memory = [k for k in ("process_bytes", "tensor_bytes") if _any(run, k)]
    heads = {"process_bytes": "process MB", "tensor_bytes": "tensors MB"}
    columns = ["", "version", "error", "CPU ms", "ratio", "quartiles", *(heads[k] for k in memory)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    timed = {k: r for k, r in run["rows"].items() if "seconds" in r}
    for label, row in sorted(timed.items(), key=lambda item: item[1]["ratio"]):
        low, high = row["ratio_quartiles"]
        name = f"**{label}**" if label.startswith("metafocus") else label
        cells = [name, row["version"], f"{row['error']:.0e}", f"{row['seconds'] * 1e3:.4g}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}"]
        cells += [_mega(row.get(k)) for k in memory]
        lines.append("| " + " | ".join(cells) + " |")
    for label, row in run["rows"].items():
        if label in timed:
            continue
        error = f"{row['error']:.1e}" if row.get("error") is not None else ""
        message = row.get("message") or ""
        cells = [label, row.get("version") or "", error, f"{row['verdict']} {message}".strip()]
        lines.append("| " + " | ".join(cells + [""] * (len(columns) - 4)) + " |")
    return lines


def case_words(case: dict[str, Any]) -> str:
    """Return a case in words."""
    return ", ".join(f"{k} {v}" for k, v in case.items())


def _definition(report: dict[str, Any]) -> ModuleType:
    return importlib.import_module(f"benchmarks.rivals.workloads.{report['workload']}")


def _any(run: dict[str, Any], key: str) -> bool:
    return any(row.get(key) is not None for row in run["rows"].values())


def _mega(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


def _flow(text: str) -> str:
    return " ".join(text.split())
