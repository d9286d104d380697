"""`metafocus train`: supervised fine-tuning, plain or with FocuSFT, from chats to a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metafocus import masks
from metafocus.cli import chats, options
from metafocus.cli.saving import saving, write_whole
from metafocus.comparison.report import environment
from metafocus.data import Collator, encode_chats, read_chats
from metafocus.errors import DataError
from metafocus.models import model_and_tokenizer
from metafocus.recipes._focusft import focusft
from metafocus.trainer import words
from metafocus.training import History, Schedule, evaluate, plain_sft, train

REPORT = "metafocus.json"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a causal language model on chats, plainly or with FocuSFT",
        description=__doc__,
        epilog="metafocus train CONFIG.yaml [flags], or metafocus train --trainer [flags]: the "
        "same with Hugging Face's Trainer and every flag of it (resume, DDP, FSDP, ...); "
        "metafocus train --trainer --help lists them.",
    )
    parser.set_defaults(run=run)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        help="FILE.jsonl or FILE.parquet with chat `messages`, or `stdlib`: questions about the "
        "documentation of the Python standard library on this machine",
    )
    data.add_argument("--heldout", help="file of held-out chats; default: --heldout-fraction")
    data.add_argument("--heldout-fraction", type=float, default=0.1, help="default %(default)s")
    data.add_argument(
        "--max-length", type=options.whole(2), default=512, help="tokens; default %(default)s"
    )
    data.add_argument(
        "--samples", type=options.whole(1), default=400, help="of stdlib; default %(default)s"
    )
    data.add_argument(
        "--turns", type=options.whole(1), default=1, help="of stdlib; default %(default)s"
    )
    data.add_argument(
        "--separate-messages",
        action="store_true",
        help="every message is a context turn of its own (default: neighbours are one turn)",
    )
    options.add_model(parser)
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method", choices=("sft", "focusft"), default="focusft", help="default %(default)s"
    )
    method.add_argument(
        "--mask",
        help=f"{', '.join(words.MASKS)}; default: context-bidirectional for focusft, causal "
        "for sft",
    )
    method.add_argument(
        "--estimator",
        default="first-order",
        help=f"{', '.join(words.ESTIMATORS)}; default %(default)s",
    )
    options.add_inner(parser, fraction=0.35, rank=32)
    outer = parser.add_argument_group("outer loop")
    outer.add_argument("--steps", type=options.whole(1), help="outer steps; default: from --epochs")
    outer.add_argument("--epochs", type=options.positive, default=5.0, help="default %(default)s")
    outer.add_argument("--batch-size", type=options.whole(1), default=4, help="default %(default)s")
    outer.add_argument("--lr", type=options.positive, default=1e-5, help="default %(default)s")
    outer.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for more time; exact"
    )
    parser.add_argument("--output", required=True, help="directory of the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output")


def wants_trainer(argv: list[str]) -> bool:
    """Whether the words of a command line are for Hugging Face's Trainer."""
    return bool(argv) and (argv[0] == "--trainer" or argv[0].endswith((".yaml", ".yml", ".json")))


def run_trainer(argv: list[str]) -> None:
    """Train with `FocusTrainer`; see `integrations.launch`."""
    # It takes transformers' Trainer with it, which is slow to import.
    from metafocus.trainer import launch

    launch.main(argv[argv[0] == "--trainer" :])


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, save."""
    _note_unused(args)
    output = _empty(args.output, args.overwrite)
    mask_word = args.mask or ("causal" if args.method == "sft" else "context-bidirectional")
    mask = words.choice(words.MASKS, mask_word, "--mask")
    estimator = words.choice(words.ESTIMATORS, args.estimator, "--estimator")()
    adapter, solver = options.adapter(args), options.solver(args)
    # Read what the user brought before anything slow happens.
    records = chats.read(args.data)
    heldout = read_chats(args.heldout) if args.heldout else None

    model, tokenizer = model_and_tokenizer(args, lambda: chats.texts(records), args.max_length)
    if records is None:
        records, heldout = chats.standard_library(args, tokenizer)
    elif heldout is None:
        records, heldout = _split(records, args.heldout_fraction, args.seed)
    if args.method == "focusft":
        # Raises if nothing matches.
        adapter.modules(model)
    merge, limit = not args.separate_messages, args.max_length
    _say(f"data: {len(records)} chats to train on, {len(heldout)} held out")
    encoded = encode_chats(records, tokenizer, max_length=limit, merge_context=merge)
    _say(f"train: {encoded.summary()}")
    held = encode_chats(heldout, tokenizer, max_length=limit, merge_context=merge)
    _say(f"held out: {held.summary()}")

    collator = Collator(pad_token_id=tokenizer.pad_token_id)
    epoch = len(encoded.samples) / args.batch_size
    steps = args.steps or max(round(args.epochs * epoch), 1)
    schedule = Schedule(steps, args.batch_size, args.lr, seed=args.seed)
    if args.gradient_checkpointing:
        # The second is its older name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if args.method == "sft":
        meta_loss = plain_sft(model, mask)
    else:
        meta_loss = focusft(
            model,
            adapter=adapter,
            mask=mask,
            solver=solver,
            estimator=estimator,
            generator=torch.Generator().manual_seed(args.seed),
        )

    def measure() -> dict[str, float]:
        # A saved checkpoint runs causally, whatever mask it was trained with.
        found = {"deployed": evaluate(model, held.samples, collator, mask=masks.causal)}
        if mask is not masks.causal:
            found["training mask"] = evaluate(model, held.samples, collator, mask=mask)
        return found

    before = measure()
    _say(f"held-out answer loss before: {_shown(before)}")
    start = time.perf_counter()
    history = train(model, meta_loss, encoded.samples, collator, schedule)
    seconds = time.perf_counter() - start
    after = measure()
    _say(f"held-out answer loss after: {_shown(after)}   ({seconds:.1f} s)")
    report = {
        "method": args.method,
        "mask": mask_word,
        "estimator": args.estimator if args.method == "focusft" else None,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "seconds": seconds,
        "settings": {k: v for k, v in vars(args).items() if k not in ("run", "given")},
        "schedule": asdict(schedule),
        "environment": environment(next(model.parameters()).dtype),
        "history": asdict(history),
    }
    _save(model, tokenizer, report, output)
    _say(f"saved: {output}")
    _warn_diverged(history)


def _note_unused(args: argparse.Namespace) -> None:
    note = partial(options.note_unused, args)
    if args.method == "sft":
        note(("estimator", *options.INNER), "with --method sft")
    if args.data == "stdlib":
        note(("heldout", "heldout_fraction"), "with --data stdlib, which has its own split")
    else:
        note(("samples", "turns"), "without --data stdlib")
    if args.heldout:
        note(("heldout_fraction",), "with --heldout")
    if args.steps:
        note(("epochs",), "with --steps")


def _empty(word: str, overwrite: bool) -> Path:
    output = options.directory(word)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise DataError(
            f"--output {output} is not empty: name another directory, or pass --overwrite to "
            "replace its checkpoint."
        )
    return output


def _split(records: list, fraction: float, seed: int) -> tuple[list, list]:
    if not 0 < fraction < 1:
        raise DataError(f"--heldout-fraction must be between 0 and 1, got {fraction}.")
    if len(records) < 2:
        raise DataError(
            f"--data holds {len(records)} chat: at least 2 are needed to hold one out. Or name "
            "--heldout FILE."
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(fraction * len(records)), 1), len(records) - 1)
    return [records[i] for i in order[count:]], [records[i] for i in order[:count]]


def _save(model: Any, tokenizer: Any, report: dict[str, Any], output: Path) -> None:
    # The report comes last: where it is, the checkpoint beside it is whole.
    with saving(output, "the checkpoint"):
        output.mkdir(parents=True, exist_ok=True)
        (output / REPORT).unlink(missing_ok=True)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        write_whole(output / REPORT, json.dumps(report, indent=2) + "\n")


def _warn_diverged(history: History) -> None:
    worse = [
        first is not None and last is not None and last > first
        for first, last in zip(history.inner_first, history.inner_last, strict=True)
    ]
    if sum(worse) > len(worse) / 2:
        _say(
            "note: the inner loss rose in most steps. Lower --inner-lr, or use fewer --inner-steps."
        )


def _shown(losses: dict[str, float]) -> str:
    return ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items())


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
