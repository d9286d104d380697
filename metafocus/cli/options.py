"""Options that commands share, and the objects that they describe."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from metafocus.adapters import LoRA, top_layers
from metafocus.errors import DataError
from metafocus.solvers import SGD, clip_per_tensor


class _Store(argparse.Action):
    """Stores a value, and in `given` that the user gave it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = {*namespace.given, self.dest}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and an exception, and which knows what was `given`."""

    def __init__(self, *args: Any, **kwargs: Any):
        # In full: what is short today may stand for two options tomorrow.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.register("action", None, _Store)
        self.set_defaults(given=set())

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise DataError(f"{message} (see {self.prog} --help)")


def whole(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` on."""

    def parse(word: str) -> int:
        if not word.isdecimal() or not least <= int(word) < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {word}")
        return int(word)

    return parse


def positive(word: str) -> float:
    """Return a finite positive number."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {word}")
    return value


INNER = (
    "inner_steps",
    "inner_lr",
    "inner_clip",
    "layer_fraction",
    "modules",
    "rank",
    "alpha",
)


def add_inner(parser: argparse.ArgumentParser, *, fraction: float, rank: int) -> None:
    """Add the options of the inner loop."""
    group = parser.add_argument_group("inner loop (defaults of FocuSFT, arXiv 2605.09932)")
    group.add_argument("--inner-steps", type=whole(0), default=2, help="default %(default)s")
    group.add_argument("--inner-lr", type=positive, default=1.0, help="default %(default)s")
    group.add_argument(
        "--inner-clip", type=positive, default=1.0, help="gradient norm of each tensor; %(default)s"
    )
    group.add_argument(
        "--layer-fraction",
        type=float,
        default=fraction,
        help="top layers with fast weights; default %(default)s",
    )
    group.add_argument(
        "--modules",
        default="gate_proj,up_proj,down_proj",
        help="names of the adapted modules, separated by commas; default %(default)s",
    )
    group.add_argument("--rank", type=whole(1), default=rank, help="default %(default)s")
    group.add_argument("--alpha", type=positive, default=2.0 * rank, help="default %(default)s")


def adapter(args: argparse.Namespace) -> LoRA:
    """Return the adapter that the options describe."""
    names = tuple(name.strip() for name in args.modules.split(",") if name.strip())
    return LoRA(top_layers(args.layer_fraction, names), rank=args.rank, alpha=args.alpha)


def solver(args: argparse.Namespace) -> SGD:
    """Return the inner optimiser that the options describe."""
    return SGD(args.inner_lr, args.inner_steps, clip=clip_per_tensor(args.inner_clip))


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="directory or hub id; default: a small Qwen2 made for the data"
    )
    group.add_argument("--attn", default="sdpa", choices=("sdpa", "eager"), help="%(default)s")
    group.add_argument(
        "--vocab-size",
        type=whole(259),
        default=2048,
        help="of the small model; default %(default)s",
    )
    group.add_argument(
        "--hidden-size", type=whole(64), default=128, help="of the small model; default %(default)s"
    )
    group.add_argument(
        "--layers", type=whole(1), default=4, help="of the small model; default %(default)s"
    )
    group.add_argument("--device", default="cpu", help="default %(default)s")
    group.add_argument("--seed", type=whole(0), default=1234, help="default %(default)s")


def note_unused(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Say which of the options were given although nothing follows from them."""
    for name in names:
        if name in args.given:
            print(f"note: --{name.replace('_', '-')} has no effect {why}.", file=sys.stderr)


def directory(word: str) -> Path:
    """Return `--output`, or raise if it cannot be a directory; nothing is made yet."""
    path = Path(word)
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not nearest.is_dir():
        raise DataError(f"--output {path}: {nearest} is a file. Name a directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"--output {path}: {nearest} cannot be written to. Name another directory.")
    return path
