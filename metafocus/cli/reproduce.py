"""`metafocus reproduce`: run tests that state published claims, and report what they measured."""

from __future__ import annotations

import argparse
import shlex
import shutil
from typing import Any

from metafocus.claims.page import findings
from metafocus.claims.process import find_tests, list_claims, run_claims
from metafocus.claims.report import Report
from metafocus.cli import options
from metafocus.errors import DataError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "reproduce",
        help="run tests that state published claims, and write a report",
        description=__doc__,
        epilog="Ends with 1 if a claim is contradicted or a test breaks.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "tests",
        nargs="?",
        metavar="DIR",
        help="directory of the tests; default tests/repro of a checkout of metafocus",
    )
    parser.add_argument("--list", action="store_true", help="list the claims and run none of them")
    parser.add_argument(
        "--full",
        action="store_true",
        help="use the published budgets: for metafocus's own claims, more than half an hour on two "
        "cores instead of minutes",
    )
    parser.add_argument(
        "--only", default="", metavar="T1,T12", help="ids of claims, separated by commas"
    )
    parser.add_argument(
        "--output_dir",
        default="reproduction",
        help="directory for reproduction.md and reproduction.json; default %(default)s",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="with --only: keep the other claims of the report in --output_dir",
    )
    options.add_whole(parser, "--workers", 1, "number of test files that run at the same time")


def run(args: argparse.Namespace) -> int:
    """List, or reproduce and report; return 0, or 1 if a claim does not hold."""
    only = options.words(args.only)
    if "only" in args.given and not only:
        raise DataError("--only is empty: name claims such as T1,T12, or leave it out.")
    if args.update and not only:
        raise DataError("--update keeps claims that are not run: choose with --only which are.")
    tests = find_tests(args.tests)
    if args.list:
        _print_list(list_claims(tests, only=only))
        return 0
    directory = options.directory(args.output_dir)
    target = directory / "reproduction.json"
    before = Report.from_json(target) if args.update else None
    # An earlier report stays as it is until this run has ended. If it is killed, the next goes on.
    running = directory / "running"
    found = run_claims(
        tests,
        running,
        full=args.full,
        only=only,
        workers=args.workers,
        show=lambda line: print(line, flush=True),
    )
    found.settings["command"] = _command(args, only)
    if before is not None:
        found = found.over(before)
    found.write(target)
    shutil.rmtree(running)
    # pytest has counted the claims of each file; and a report may have claims that did not run now.
    print(f"the whole report: {findings(found)}")
    print(f"wrote {target.with_suffix('.md')} and {target}")
    return 0 if found.holds else 1


def _command(args: argparse.Namespace, only: list[str]) -> str:
    words = ["metafocus", "reproduce", *([args.tests] if args.tests else [])]
    words += ["--full"] if args.full else []
    words += ["--only", ",".join(only)] if only else []
    return shlex.join(words)


def _print_list(claims: list[dict[str, Any]]) -> None:
    """Print id, paper and what it says, one claim a line."""
    widths = [max(len(claim[key]) for claim in claims) for key in ("id", "paper")]
    for claim in claims:
        id, paper = (claim[k].ljust(w) for k, w in zip(("id", "paper"), widths, strict=True))
        print(f"{id}  {paper}  {claim['says']}")
