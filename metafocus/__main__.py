"""`metafocus compare | train`: see `metafocus COMMAND --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import metafocus
from metafocus.cli import compare, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after an error of the user's, told in one line."""
    parser = argparse.ArgumentParser(prog="metafocus", description=metafocus.__doc__)
    parser.add_argument("--version", action="version", version=metafocus.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (compare, train):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        # Ours are subclasses; the constructors' checks of options are plain ones.
        print(f"metafocus: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
