"""`metafocus compare | train | profile | eval`: see `metafocus COMMAND --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import metafocus
from metafocus.cli import compare, evaluate, options, profile, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after an error of the user's, told in one line."""
    parser = options.Parser(prog="metafocus", description=metafocus.__doc__)
    parser.add_argument("--version", action="version", version=metafocus.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (compare, train, profile, evaluate):
        command.add_parser(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["train"] and train.wants_trainer(words[1:]):
            train.run_trainer(words[1:])
        else:
            args = parser.parse_args(words)
            args.run(args)
    except (ValueError, OSError) as error:
        # Ours are subclasses of the first; the second is a file or a disk.
        print("metafocus: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
