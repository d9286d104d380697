"""The comparison as Markdown: verdicts on the targets, a table for each case, plots."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from benchmarks.rivals import plots
from benchmarks.rivals.targets import Verdict, verdicts

INTRODUCTION = """
Each library runs in its own idiom, in the environment that it needs. First, all gradients are
compared with the reference in float64: a wrong one is reported with its relative error, and not
timed. Then the repetitions of all libraries are interleaved in random order, each library in a
process whose allocator keeps freed blocks. The tables show the median CPU time, and the median of
the ratio to the reference in each repetition, with quartiles; *wall* is the time of the clock. With
two threads the CPU time of both is counted, also while one spins and waits for the other. *process*
is the growth of the peak RSS over one call in a fresh process whose allocator returns freed blocks;
it is less than the need of a library that keeps its last graph. *tensors* is the peak of live
tensors. *GFLOP* counts matrix products, attention and convolutions as torch does.
Runs without a day are of 2026-11-28, on a slower machine of the same kind. *load* is the load
average of this machine before and after. If it is above the number of threads, other programs
ran at the same time: times are then noisy, those of the clock more than those of the CPU, and two
threads wait for each other.
"""
TARGETS = """
A target is the ratio of what *ours* needs to what the other library needs. It is judged by time or
by the peak memory of a process. *fastest* is the rival with the right gradient and the least time.
Time is CPU time on one thread, and the time of the clock on two; both ratios are shown.
"""


def finding(folder: Path) -> str:
    """Return in two sentences how many targets are met, and how far the others are missed."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rivals_*.json"))]
    found = [v for report in reports for v in judge(report)]
    missed = [v.value / v.target.at_most - 1 for v in found if v.value is not None and not v.met]
    total = f"**{sum(v.met for v in found)} of {len(found)} targets are met.**"
    if not missed:
        return total
    return f"{total} The largest miss is {max(missed):.0%}; the table of targets has all of them."


def sections(
    folder: Path, figures: Path, link: str, after: Mapping[str, list[str]] = MappingProxyType({})
) -> list[str]:
    """Return the lines of all workloads with results; write their plots.

    Args:
        folder: where `rivals_*.json` are.
        figures: where the plots go.
        link: that folder, as the page sees it.
        after: more lines for the end of a workload's section.
    """
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rivals_*.json"))]
    if not reports:
        return []
    judged = [(report, judge(report)) for report in reports]
    lines = [
        "",
        "## Comparison with other libraries",
        "",
        _flow(INTRODUCTION),
        "",
        "### Targets",
        "",
        _flow(TARGETS),
    ]
    all_verdicts = [v for _, found in judged for v in found]
    met = sum(v.met for v in all_verdicts)
    lines += ["", f"{met} of {len(all_verdicts)} are met.", "", *target_table(judged)]
    figures.mkdir(parents=True, exist_ok=True)
    for report in reports:
        lines += [*section(report, figures, link), *after.get(report["workload"], [])]
    return lines


def judge(report: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on all targets of a workload."""
    definition = _definition(report)
    found = []
    for target in getattr(definition, "TARGETS", []):
        missing = Verdict(target, dict(target.case), 1, target.other, None)
        found += verdicts(target, report["runs"]) or [missing]
    return found


def target_table(judged: list[tuple[dict[str, Any], list[Verdict]]]) -> list[str]:
    """Return one row for each target, case and number of threads."""
    lines = [
        "| | target | case | threads | ours / other | allowed | measured | CPU | wall | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report, found in judged:
        for v in found:
            value = "-" if v.value is None else f"{v.value:.3g}"
            cpu, wall = ("" if x is None else f"{x:.3g}" for x in (v.cpu, v.wall))
            verdict = v.words() if v.met else f"**{v.words()}**"
            lines.append(
                f"| {report['workload'].upper()} | {v.target.text} | {case_words(v.case)} | "
                f"{v.threads} | {v.target.ours} / {v.other} | {v.target.at_most:.3g} | {value} | "
                f"{cpu} | {wall} | {verdict} |"
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
        load = "" if "load" not in run else ", load " + " to ".join(f"{x:.1f}" for x in run["load"])
        day = f", {run['day']}" if "day" in run else ""
        words = f"**{case_words(run['case'])}**, {threads}, {run['repeats']} repetitions{load}{day}"
        lines += [words, "", *table(run), ""]
    return lines[:-1]


HEADS = {"process_bytes": "process MB", "tensor_bytes": "tensors MB", "flop": "GFLOP"}
UNITS = {"process_bytes": 2**20, "tensor_bytes": 2**20, "flop": 1e9}


def table(run: dict[str, Any]) -> list[str]:
    """Return the rows of one case, the fastest first, then those without a time."""
    more = [k for k in HEADS if any(row.get(k) for row in run["rows"].values())]
    columns = ["", "version", "error", "CPU ms", "ratio", "quartiles", "wall ms"]
    columns += [HEADS[k] for k in more]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    timed = {k: r for k, r in run["rows"].items() if "seconds" in r}
    for label, row in sorted(timed.items(), key=lambda item: item[1]["ratio"]):
        low, high = row["ratio_quartiles"]
        name = f"**{label}**" if label.startswith("metafocus") else label
        error = f"{row['error']:.0e}" if row.get("error") is not None else row["verdict"]
        wall = f"{statistics.median(row['wall']) * 1e3:.4g}" if row.get("wall") else ""
        cells = [name, row["version"], error, f"{row['seconds'] * 1e3:.4g}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}", wall]
        cells += [f"{row[k] / UNITS[k]:.1f}" if row.get(k) is not None else "" for k in more]
        lines.append("| " + " | ".join(cells) + " |")
    for label, row in run["rows"].items():
        if label in timed:
            continue
        if row.get("process_bytes"):
            cells = [label, row["version"], f"{row['error']:.0e}", "not timed", "", "", ""]
            cells += [f"{row[k] / UNITS[k]:.1f}" if row.get(k) is not None else "" for k in more]
            lines.append("| " + " | ".join(cells) + " |")
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


def _flow(text: str) -> str:
    return " ".join(text.split())
