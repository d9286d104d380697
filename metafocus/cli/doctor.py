"""`metafocus doctor`: versions, devices, kernels, precision: what a bug report should contain."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from metafocus import models
from metafocus.cli import options
from metafocus.doctor import Finding, examined, kernels, machine, precision, versions

WIDTH = 120
SIGNS: dict[bool | None, str] = {True: "yes", False: "NO", None: ""}


def add_parser(commands: Any, version: str) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="print what a bug report should contain: versions, kernels, precision",
        description=__doc__,
    )
    parser.set_defaults(run=partial(run, version))
    parser.add_argument(
        "--model_name_or_path",
        help="a model to be examined too: directory, hub id, GGUF file or smollm2",
    )
    parser.add_argument(
        "--attn_implementation",
        default="sdpa",
        choices=options.ATTENTION,
        help="attention of the model; default %(default)s",
    )
    parser.add_argument("--device", default="cpu", help="device to examine; default %(default)s")


def run(version: str, args: argparse.Namespace) -> int:
    """Measure and print; return 1 if anything is not as it should be."""
    device = options.device(args)
    parts = {
        "versions": versions(version),
        "machine": machine(),
        'kernels of span_attention(backend="auto"), 256 tokens': kernels(device),
        "relative errors against float64": precision(device),
    }
    if args.model_name_or_path is None:
        options.note_unused(args, ("attn_implementation",), "without --model_name_or_path")
    else:
        chosen = {"attn_implementation": args.attn_implementation}
        loaded, _ = models.load(args.model_name_or_path, **chosen)
        model: Any = loaded
        parts[models.described(model)] = examined(model.to(device))
    table = Table(show_header=False, show_edge=False, box=None)
    for title, findings in parts.items():
        table.add_row(f"[bold]{title}", "", "exact?" if judged(findings) else "")
        for name, value, good in findings:
            table.add_row(f"  {name}", value, SIGNS[good])
    Console(width=WIDTH, highlight=False, markup=True).print(table)
    return int(any(good is False for found in parts.values() for _, _, good in found))


def judged(findings: list[Finding]) -> bool:
    """Return whether any of the findings is judged."""
    return any(good is not None for _, _, good in findings)
