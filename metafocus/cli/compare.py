"""`metafocus compare`: hypergradients of FocuSFT on a language model, side by side."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from metafocus.cli import chats, options
from metafocus.cli.saving import saving
from metafocus.comparison.run import compare
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.errors import DataError
from metafocus.models import model_and_tokenizer
from metafocus.problem import trainable
from metafocus.recipes._focusft import focusft_problem
from metafocus.trainer import words
from metafocus.types import Episode

QUICK = {"max_length": 192, "batch_size": 1, "repeats": 1}
QUICK_MODEL = {"hidden_size": 64, "layers": 3, "vocab_size": 512}
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
        "--data", default="stdlib", help="FILE.jsonl, FILE.parquet or stdlib (default)"
    )
    parser.add_argument(
        "--max-length", type=options.whole(2), default=256, help="tokens; default %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=options.whole(1), default=2, help="default %(default)s"
    )
    parser.add_argument(
        "--mask",
        default="context-bidirectional",
        help=f"{', '.join(words.MASKS)}; default %(default)s",
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
    parser.add_argument("--quick", action="store_true", help="smaller defaults: a quick look")
    parser.add_argument("--output", help="directory for compare.png and compare.json")
    options.add_model(parser)
    options.add_inner(parser, fraction=0.75, rank=8)


def run(args: argparse.Namespace) -> None:
    """Compare and report."""
    if args.quick:
        smaller = QUICK if args.model else QUICK | QUICK_MODEL
        vars(args).update({k: v for k, v in smaller.items() if k not in args.given})
    directory = options.directory(args.output) if args.output else None
    named = [word.strip() for word in args.estimators.split(",") if word.strip()]
    estimators = {word: words.choice(words.ESTIMATORS, word, "--estimators")() for word in named}
    if not estimators:
        raise DataError(f"--estimators is empty: use some of {', '.join(words.ESTIMATORS)}.")
    reference = (
        args.reference
        if args.reference in estimators
        else words.choice(words.ESTIMATORS, args.reference, "--reference")()
    )
    mask = words.choice(words.MASKS, args.mask, "--mask")
    records = chats.read(args.data)
    model, tokenizer = model_and_tokenizer(args, stdlib_qa.texts, args.max_length)
    model = model.to(getattr(torch, args.dtype))
    if records is None:
        records = chats.documentation(args, tokenizer, split="train", n=args.batch_size)
    samples = encode_chats(records, tokenizer, max_length=args.max_length).samples
    if len(samples) < args.batch_size:
        raise DataError(
            f"--batch-size {args.batch_size} is more than the {len(samples)} chats with an answer "
            "in --data."
        )
    batch = Collator(pad_token_id=tokenizer.pad_token_id)(samples[: args.batch_size])
    batch = {k: v.to(args.device) for k, v in batch.items()}

    # The same start for every estimator: the fast weights are drawn once.
    adapter = options.adapter(args)
    start = adapter.init(model, torch.Generator().manual_seed(args.seed))
    problem = dataclasses.replace(
        focusft_problem(model, adapter=adapter, mask=mask), init=lambda slow, support: start
    )
    outer = trainable(model)
    print(
        f"{type(model).__name__} with {sum(p.numel() for p in outer.values()):,} parameters, "
        f"{sum(p.numel() for p in start.values()):,} fast weights, {args.inner_steps} inner "
        f"steps, batch {list(batch['input_ids'].shape)}, {args.dtype}",
        flush=True,
    )
    result = compare(
        problem,
        outer,
        Episode(batch, batch),
        solver=options.solver(args),
        estimators=estimators,
        reference=reference,
        repeats=args.repeats,
    )
    print(result.table())
    if directory:
        with saving(directory, "the comparison"):
            directory.mkdir(parents=True, exist_ok=True)
            result.plot(directory / "compare.png")
            result.to_json(directory / "compare.json")
        print(f"wrote {directory / 'compare.png'} and {directory / 'compare.json'}")
