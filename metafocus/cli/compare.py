"""`metafocus compare`: hypergradients of FocuSFT on a language model, side by side."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from metafocus.cli import chats, options
from metafocus.comparison.over import plot_over
from metafocus.comparison.report import Comparison
from metafocus.comparison.run import compare
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.errors import DataError
from metafocus.models import described
from metafocus.problem import trainable
from metafocus.recipes._focusft import focusft_problem
from metafocus.trainer.checkpoints import saving
from metafocus.trainer.names import ESTIMATORS, MASKS, named
from metafocus.types import Episode

QUICK = {"max_length": 192, "per_device_train_batch_size": 1, "repeats": 1}
QUICK_MODEL = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 512}
DEFAULT = "first-order,unrolled-last-1,unrolled,unrolled-recompute,implicit-cg"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="compare estimators of one hypergradient: error, time, memory",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--train_file", default=chats.STDLIB, help="FILE.jsonl, FILE.parquet or stdlib (default)"
    )
    parser.add_argument(
        "--max_length", type=options.whole(2), default=256, help="tokens; default %(default)s"
    )
    parser.add_argument(
        "--per_device_train_batch_size",
        type=options.whole(1),
        default=2,
        help="chats; default %(default)s",
    )
    parser.add_argument(
        "--mask",
        default="context-bidirectional",
        help=f"{', '.join(MASKS)}; default %(default)s",
    )
    parser.add_argument(
        "--estimators", default=DEFAULT, help="separated by commas; default %(default)s"
    )
    parser.add_argument(
        "--reference", default="unrolled", help="what is taken as exact; default %(default)s"
    )
    parser.add_argument(
        "--repeats",
        type=options.whole(1),
        default=3,
        help="how often each is timed; default %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of the model; default %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="smaller defaults, for a first look")
    parser.add_argument("--output_dir", help="directory for the figure and the numbers")
    options.add_model(parser)
    options.add_inner(parser, fraction=0.75, rank=8, rates=True)


def run(args: argparse.Namespace) -> None:
    """Compare and report."""
    if args.quick:
        smaller = QUICK if args.model_name_or_path else QUICK | QUICK_MODEL
        vars(args).update({k: v for k, v in smaller.items() if k not in args.given})
    directory = options.directory(args.output_dir) if args.output_dir else None
    estimators = {
        name: named("estimators", name, ESTIMATORS)() for name in options.words(args.estimators)
    }
    if not estimators:
        raise DataError(f"--estimators is empty: use some of {', '.join(ESTIMATORS)}.")
    reference = (
        args.reference
        if args.reference in estimators
        else named("reference", args.reference, ESTIMATORS)()
    )
    mask = named("mask", args.mask, MASKS)
    records = chats.read(args.train_file)
    model, tokenizer = options.model_on_device(args, stdlib_qa.texts, args.max_length)
    model, rows = model.to(getattr(torch, args.dtype)), args.per_device_train_batch_size
    if records is None:
        records = chats.documentation(
            tokenizer, split="train", n=rows, max_length=args.max_length, seed=args.seed
        )
    samples = encode_chats(records, tokenizer, max_length=args.max_length).samples
    if len(samples) < rows:
        raise DataError(
            f"--per_device_train_batch_size {rows} is more than the {len(samples)} chats with an "
            "answer in --train_file."
        )
    batch = Collator(pad_token_id=tokenizer.pad_token_id)(samples[:rows])
    batch = {k: v.to(args.device) for k, v in batch.items()}

    # The same start for every estimator: the fast weights are drawn once.
    adapter = options.adapter(args)
    start = adapter.init(model, torch.Generator().manual_seed(args.seed))
    problem = dataclasses.replace(
        focusft_problem(model, adapter=adapter, mask=mask), init=lambda slow, support: start
    )
    outer = trainable(model)
    print(
        f"{described(model)}; {sum(p.numel() for p in start.values()):,} fast weights, "
        f"{args.inner_steps} inner steps, batch {list(batch['input_ids'].shape)}, {args.dtype}",
        flush=True,
    )
    found: dict[float, Comparison] = {}
    for rate in args.inner_lr:
        found[rate] = compare(
            problem,
            outer,
            Episode(batch, batch),
            solver=options.solver(args, rate),
            estimators=estimators,
            reference=reference,
            repeats=args.repeats,
        )
        heading = f"\ninner learning rate {rate:g}\n" if len(args.inner_lr) > 1 else ""
        print(heading + found[rate].table(), flush=True)
    if directory:
        with saving(directory, "the comparison"):
            directory.mkdir(parents=True, exist_ok=True)
            written = list(_write(found, directory))
        print("wrote " + " and ".join(str(path) for path in written))


def _write(found: dict[float, Comparison], directory: Path) -> Iterator[Path]:
    yield directory / "compare.png"
    if len(found) > 1:
        plot_over(found, directory / "compare.png", "inner learning rate")
    for rate, result in found.items():
        name = f"compare-lr-{rate:g}.json" if len(found) > 1 else "compare.json"
        if len(found) == 1:
            result.plot(directory / "compare.png")
        result.to_json(directory / name)
        yield directory / name
