"""Words of the command line and the objects they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from metafocus import masks
from metafocus.adapters import LoRA, top_layers
from metafocus.errors import DataError
from metafocus.estimators import Estimator, FirstOrder, Implicit, Unrolled
from metafocus.hvp import hvp_finite, hvp_forward
from metafocus.linear import CG
from metafocus.solvers import SGD, clip_per_tensor

MASKS = {
    "causal": masks.causal,
    "prefix-lm": masks.prefix_lm,
    "context-bidirectional": masks.context_bidirectional,
    "full": masks.full,
}

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "first-order": FirstOrder,
    "unrolled-last-1": lambda: Unrolled(last=1),
    "unrolled": Unrolled,
    "unrolled-recompute": lambda: Unrolled(recompute=True),
    "unrolled-forward": lambda: Unrolled(hvp=hvp_forward),
    "unrolled-finite": lambda: Unrolled(hvp=hvp_finite()),
    "implicit-cg": lambda: Implicit(CG(10)),
}


def add_inner(parser: argparse.ArgumentParser, *, fraction: float, rank: int) -> None:
    """Add the options of the inner loop."""
    group = parser.add_argument_group("inner loop (defaults of FocuSFT, arXiv 2605.09932)")
    group.add_argument("--inner-steps", type=int, default=2, help="default %(default)s")
    group.add_argument("--inner-lr", type=float, default=1.0, help="default %(default)s")
    group.add_argument(
        "--inner-clip", type=float, default=1.0, help="gradient norm of each tensor; %(default)s"
    )
    group.add_argument(
        "--layer-fraction", type=float, default=fraction, help="top layers with fast weights"
    )
    group.add_argument(
        "--modules",
        default="gate_proj,up_proj,down_proj",
        help="names of the adapted modules, separated by commas; default %(default)s",
    )
    group.add_argument("--rank", type=int, default=rank, help="default %(default)s")
    group.add_argument("--alpha", type=float, default=2.0 * rank, help="default %(default)s")


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
    group.add_argument("--vocab-size", type=int, default=2048, help="of the small model")
    group.add_argument("--hidden-size", type=int, default=128, help="of the small model")
    group.add_argument("--layers", type=int, default=4, help="of the small model")
    group.add_argument("--device", default="cpu", help="default %(default)s")
    group.add_argument("--seed", type=int, default=1234, help="default %(default)s")


def choice(table: dict, word: str, option: str):
    """Return the object for a word, or raise an error that lists the words."""
    if word not in table:
        raise DataError(f"{option} {word!r} is unknown: use one of {', '.join(table)}.")
    return table[word]
