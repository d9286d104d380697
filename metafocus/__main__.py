"""`metafocus compare | train | profile | doctor | attribute | eval | generate | reproduce`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import metafocus
from metafocus.cli import attribute, compare, doctor, evaluate, generate, profile, reproduce
from metafocus.cli.parsing import Parser, suggestion
from metafocus.cli.shares import refuse_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 2 after a mistake of the user, printed in one line."""
    parser = Parser(prog="metafocus", description=metafocus.__doc__)
    parser.add_argument("--version", action="version", version=metafocus.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare.add_parser(commands)
    # Listed only: its settings are those of Hugging Face's Trainer, which takes seconds to import.
    commands.add_parser("train", help="fine-tune a model on chats, plainly or with FocuSFT")
    for command in (profile, attribute, evaluate, generate, reproduce):
        command.add_parser(commands)
    doctor.add_parser(commands, metafocus.__version__)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        # Flags are looked at by argparse.
        if words and words[0] not in commands.choices and words[0][:1] != "-":
            meant = suggestion(words[0], commands.choices)
            if meant is not None:
                parser.error(f"unknown command {words[0]!r}, did you mean {meant}?")
        if words[:1] == ["train"]:
            from metafocus.cli import train

            train.main(words[1:])
            return 0
        args = parser.parse_args(words)
        if words[:1] not in (["eval"], ["profile"]):
            refuse_ranks(words[0])
        # Only a command that judges something returns a code of its own.
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        # Ours are subclasses of the first; the second is a file or a disk; the third is a package
        # that a setting needs.
        print("metafocus: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
