"""Options that commands share, and the objects that they describe.

They have the names of `metafocus train`: one grammar for all commands.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from metafocus import models
from metafocus.adapters import LoRA, top_layers
from metafocus.errors import DataError, first_line
from metafocus.solvers import SGD, clip_per_tensor

ATTENTION = ("sdpa", "eager")
OF_SMALL = ("vocab_size", "hidden_size", "num_hidden_layers")
INNER = (
    "inner_steps",
    "inner_lr",
    "inner_clip",
    "layer_fraction",
    "lora_modules",
    "lora_rank",
    "lora_alpha",
)


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


def positives(word: str) -> list[float]:
    """Return finite positive numbers that commas separate."""
    return [positive(part.strip()) for part in word.split(",")]


def add_whole(parser: Any, name: str, default: int, what: str, *, least: int = 1) -> None:
    """Add an option that is a whole number from `least` on; its help says of what."""
    text = f"{what}; default %(default)s"
    parser.add_argument(name, type=whole(least), default=default, help=text)


def words(text: str) -> list[str]:
    """Return the words that commas separate, without white space and empty ones.

    Example:
        >>> words("qa1, qa2,")
        ['qa1', 'qa2']
    """
    return [word for part in text.split(",") if (word := part.strip())]


def add_inner(
    parser: argparse.ArgumentParser, *, fraction: float, rank: int, rates: bool = False
) -> None:
    """Add the options of the inner loop; `rates`: `--inner_lr` may be several."""
    group = parser.add_argument_group("inner loop (defaults of FocuSFT, arXiv 2605.09932)")
    add_whole(group, "--inner_steps", 2, "number of inner steps", least=0)
    group.add_argument(
        "--inner_lr",
        type=positives if rates else positive,
        default="1.0",
        help="learning rate of the inner loop"
        + ", or several separated by commas" * rates
        + "; default %(default)s",
    )
    group.add_argument(
        "--inner_clip",
        type=positive,
        default=1.0,
        help="largest gradient norm of each fast weight; default %(default)s",
    )
    group.add_argument(
        "--layer_fraction",
        type=float,
        default=fraction,
        help="share of the layers, from the top, with fast weights; default %(default)s",
    )
    group.add_argument(
        "--lora_modules",
        default="gate_proj,up_proj,down_proj",
        help="modules with fast weights, separated by commas; default %(default)s",
    )
    add_whole(group, "--lora_rank", rank, "rank of the fast weights")
    group.add_argument(
        "--lora_alpha",
        type=positive,
        help="the fast weights are scaled by lora_alpha / lora_rank; default twice lora_rank",
    )


def adapter(args: argparse.Namespace) -> LoRA:
    """Return the adapter that the options describe."""
    where = top_layers(args.layer_fraction, tuple(words(args.lora_modules)))
    return LoRA(where, args.lora_rank, args.lora_alpha)


def solver(args: argparse.Namespace, rate: float | None = None) -> SGD:
    """Return the inner optimiser that the options describe, with one of several rates."""
    chosen: Any = args.inner_lr if rate is None else rate
    return SGD(chosen, args.inner_steps, clip=clip_per_tensor(args.inner_clip))


def add_model(
    parser: argparse.ArgumentParser, *, small: bool = True, required: bool = True
) -> None:
    """Add the options of the model; `small`: of the one that is made where none is named, too."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path",
        required=required and not small,
        help="directory, hub id, GGUF file or smollm2"
        + "; default: a small Qwen2 made from scratch" * small,
    )
    group.add_argument(
        "--attn_implementation",
        default="sdpa",
        choices=ATTENTION,
        help="attention of the model; default %(default)s",
    )
    if small:
        for name, least, default in zip(OF_SMALL, (259, 64, 1), (2048, 128, 4), strict=True):
            text = f"{name} of the small model; default %(default)s"
            group.add_argument(f"--{name}", type=whole(least), default=default, help=text)
    group.add_argument("--device", default="cpu", help="device of the model; default %(default)s")
    add_whole(group, "--seed", 42, "seed of all random numbers", least=0)


def model_and_tokenizer(
    args: Any,
    texts: Callable[[], Iterable[str]],
    max_length: int,
    *,
    base: bool = False,
    template: str | None = None,
) -> tuple[Any, Any]:
    """Return the model that `--model_name_or_path` names, or a small one for `texts()`.

    Args:
        args: `model_name_or_path`, `attn_implementation`, and the sizes of the small model.
        texts: what its tokenizer learns from.
        max_length: the longest sequence that the model must take.
        base: whether a model without a chat template is enough.
        template: a chat template instead of the tokenizer's own.

    Raises:
        DataError: if the model cannot be loaded, is too small for `max_length` or its tokenizer,
            or has no chat template.
    """
    attention = args.attn_implementation
    if args.model_name_or_path is None:
        sizes = {name: getattr(args, name) for name in OF_SMALL}
        made = {"max_length": max_length, "attn_implementation": attention, **sizes}
        model, tokenizer = models.small(texts(), **made)
    else:
        model, tokenizer = models.load(args.model_name_or_path, attn_implementation=attention)
        models.check_fits(model, tokenizer, max_length)
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None and not base:
        raise DataError(
            f"the tokenizer of {args.model_name_or_path!r} has no chat template. Use an "
            "instruction-tuned model, or set tokenizer.chat_template and save it beside the model "
            "(metafocus train takes --chat_template FILE)."
        )
    return model, tokenizer


def model_on_device(
    args: argparse.Namespace,
    texts: Callable[[], Iterable[str]],
    max_length: int,
    *,
    base: bool = False,
) -> tuple[Any, Any]:
    """Return `model_and_tokenizer` with the weights on `--device`, drawn from `--seed`.

    Raises:
        DataError: if the device cannot be used, too.
    """
    device(args)
    torch.manual_seed(args.seed)
    if args.model_name_or_path is not None:
        note_unused(args, OF_SMALL, "with --model_name_or_path")
    model, tokenizer = model_and_tokenizer(args, texts, max_length, base=base)
    return model.to(args.device), tokenizer


def device(args: argparse.Namespace) -> torch.device:
    """Return the device that `--device` names.

    Raises:
        DataError: if it cannot be used.
    """
    try:
        return torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device!r} cannot be used: {first_line(error)}") from error


def as_record(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a command for its report."""
    return {k: v for k, v in vars(args).items() if k not in ("run", "given")}


def note_unused(args: Any, names: Iterable[str], why: str) -> None:
    """Say which of the options were given although nothing follows from them."""
    for name in names:
        if name in args.given:
            print(f"note: --{name} has no effect {why}.", file=sys.stderr)


def directory(word: str, flag: str = "--output_dir") -> Path:
    """Return a directory to write to, or raise if it cannot be one; nothing is made yet.

    Raises:
        DataError: naming the flag and the obstacle.
    """
    path = Path(word)
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not nearest.is_dir():
        raise DataError(f"{flag} {path}: {nearest} is a file. Name a directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"{flag} {path}: {nearest} cannot be written to. Name another directory.")
    return path
