"""`metafocus compare | train | profile | eval | reproduce`: see `metafocus COMMAND --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import metafocus
from metafocus.cli import compare, evaluate, options, profile, reproduce, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its code: 2 after an error of the user's, told in one line."""
    parser = options.Parser(prog="metafocus", description=metafocus.__doc__)
    parser.add_argument("--version", action="version", version=metafocus.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (compare, train, profile, evaluate, reproduce):
        command.add_parser(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["train"] and train.wants_trainer(words[1:]):
            train.run_trainer(words[1:])
        else:
            args = parser.parse_args(words)
            # Only a command that judges something has a code of its own.
            return args.run(args) or 0
    except (ValueError, OSError) as error:
        # Ours are subclasses of the first; the second is a file or a disk.
        print("metafocus: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
