"""`metafocus reproduce`: run the suite of published claims and write what it found."""

from __future__ import annotations

import argparse
import collections
from typing import Any

from metafocus.claims import page as claims_page
from metafocus.claims.suite import VERDICTS, Reproduction, reproduce
from metafocus.cli import options
from metafocus.errors import DataError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "reproduce",
        help="run the suite of published claims and write a report",
        description=__doc__,
        epilog="Ends with 1 if a claim is contradicted or a test breaks.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--full",
        action="store_true",
        help="the published budgets: about half an hour on two cores instead of minutes",
    )
    parser.add_argument(
        "--only", default="", metavar="T1,T12", help="ids of claims, separated by commas"
    )
    parser.add_argument(
        "--output",
        default="reproduction",
        help="directory for reproduction.md and reproduction.json; default %(default)s",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="with --only: keep the other claims of the report that is in --output",
    )
    parser.add_argument("--suite", help="folder of the suite; default tests/repro of a checkout")
    parser.add_argument(
        "--workers",
        type=options.whole(1),
        default=1,
        help="processes at once (needs pytest-xdist); default %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Reproduce and report; return 0, or 1 if a claim does not hold."""
    only = [word.strip() for word in args.only.split(",") if word.strip()]
    if "only" in args.given and not only:
        raise DataError("--only is empty: name claims such as T1,T12, or leave it out.")
    if args.update and not only:
        raise DataError("--update keeps claims that are not run: say with --only which are.")
    directory = options.directory(args.output)
    report = directory / "reproduction.json"
    before = Reproduction.from_json(report) if args.update else None
    found = reproduce(
        args.suite,
        full=args.full,
        only=only,
        workers=args.workers,
        progress=lambda line: print(line, flush=True),
    )
    if before:
        found = found.over(before)
    words = ["metafocus reproduce", *(["--full"] if found.settings["full"] else [])]
    words += [f"--only {','.join(found.settings['only'])}"] if found.settings["only"] else []
    directory.mkdir(parents=True, exist_ok=True)
    found.to_json(report)
    (directory / "reproduction.md").write_text(claims_page.page(found, " ".join(words)))
    for row in found.rows:
        if row["verdict"] in ("contradicted", "error"):
            told = claims_page.measured(row["measured"])
            print(f"{row['verdict']}: {row['id']} {row['test']}: {told} {row['message']}".strip())
    count = collections.Counter(row["verdict"] for row in found.rows)
    print(
        f"{len(found.rows)} claims in {found.settings['seconds']:.0f} s: "
        + ", ".join(f"{count[v]} {v}" for v in reversed(VERDICTS) if count[v])
    )
    print(f"wrote {directory / 'reproduction.md'} and {report}")
    return 0 if found.holds else 1
